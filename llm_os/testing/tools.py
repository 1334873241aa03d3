"""The contract of tools as tests (`kernel/tool.py`): a schema that models can be shown, calls that come to an end."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Mapping
from typing import Any, ClassVar

import anyio
import msgspec

from llm_os.kernel.tool import Tool


class ToolConformance:
    """Inherit from it, and say what is to be tested:

    class TestMine(llm_os.testing.ToolConformance):
        arguments = ({"city": "Berlin"},)
        def make(self): return my_tool

    `arguments` are some that fit the schema. The tool is called with them: give it a place where that does no harm.
    """

    arguments: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def make(self) -> Tool:
        raise NotImplementedError(f"{type(self).__name__} has to say which tool it tests: def make(self)")

    def test_its_name_is_one_that_models_can_say(self) -> None:
        tool = self.make()
        assert isinstance(tool, Tool)
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", tool.name), tool.name
        assert tool.description.strip(), "a model chooses by the description"

    def test_its_parameters_are_a_json_schema_of_an_object(self) -> None:
        schema = self.make().parameters
        assert msgspec.json.decode(msgspec.json.encode(schema)) == schema, "the schema is JSON and nothing else"
        assert schema.get("type") == "object"
        properties = schema.get("properties", {})
        assert isinstance(properties, dict) and all(isinstance(each, dict) for each in properties.values())
        assert set(schema.get("required", [])) <= set(properties)

    def test_the_examples_fit_the_schema(self) -> None:
        schema = self.make().parameters
        properties = schema.get("properties", {})
        for arguments in self.arguments:
            assert set(schema.get("required", [])) <= set(arguments), f"{arguments} lacks some"
            if not schema.get("additionalProperties", False):
                assert set(arguments) <= set(properties), f"{arguments} has some that the schema does not know"

    def test_its_limits_are_limits(self) -> None:
        tool = self.make()
        assert 0 < tool.timeout_s <= 3600 and tool.output_limit > 0
        assert tool.expected_s is None or 0 <= tool.expected_s <= tool.timeout_s

    def test_permissions_see_one_line_that_depends_on_the_arguments_alone(self) -> None:
        tool = self.make()
        if tool.argument_class is None:
            return
        for arguments in self.arguments:
            name = tool.argument_class(arguments)
            assert isinstance(name, str) and name and "\n" not in name
            assert tool.argument_class(dict(arguments)) == name

    def test_calls_give_text_or_json_in_their_time(self) -> None:
        tool = self.make()
        for arguments in self.arguments:
            result = _call(tool, arguments)
            text = result if isinstance(result, str) else msgspec.json.encode(result).decode()
            assert len(text) <= tool.output_limit, "the rest would be cut off"

    def test_a_call_does_not_change_its_arguments(self) -> None:
        tool = self.make()
        for arguments in self.arguments:
            before = msgspec.json.encode(arguments)
            _call(tool, arguments)
            assert msgspec.json.encode(arguments) == before


def _call(tool: Tool, arguments: Mapping[str, Any]) -> Any:
    """In a worker thread, as the kernel's host does. Raises what the tool raises."""
    answer: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            if inspect.iscoroutinefunction(tool.call):
                answer.append(anyio.run(tool.call, arguments))
            else:
                answer.append(tool.call(arguments))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(tool.timeout_s)
    assert not thread.is_alive(), f"{tool.name} takes longer than its timeout_s, {tool.timeout_s:g}"
    if failure:
        raise failure[0]
    return answer[0]
