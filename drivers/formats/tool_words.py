"""Tools in words, for chat templates that know none: the instruction and the marks of Hermes and Qwen. Pure text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def tool_names(functions: Sequence[Message]) -> list[str]:
    """What the tools are called, as far as the definitions say it."""
    inner = [function.get("function", function) for function in functions]
    return [str(one["name"]) for one in inner if isinstance(one, dict) and "name" in one]


def with_instructions(messages: Sequence[Message], functions: Sequence[Message], role: str) -> list[Message]:
    """The messages, and in the first of them how to call these functions. `role` is who says so: system or user."""
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    text = f"{_BEFORE}{listed}{_AFTER}"
    system = ""
    if messages[0]["role"] == "system":
        system, messages = f"{messages[0]['content']}\n\n", messages[1:]
    if role == "system" or not messages or messages[0]["role"] != "user":
        return [{"role": "system", "content": f"{system}{text}"}, *messages]
    first = {**messages[0], "content": f"{system}{text}\n\n{messages[0]['content']}"}
    return [first, *messages[1:]]


def without_tools(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls, and what tools said, written out. What several tools said is one message."""
    plain: list[Message] = []
    after_tool = False
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message.get('content')}\n</tool_response>"
            if after_tool:
                plain[-1]["content"] += f"\n{text}"
            else:
                plain.append({"role": "user", "content": text})
        elif message.get("tool_calls"):
            said = [text for text in (message.get("content"),) if text]
            plain.append({"role": message["role"], "content": "\n".join((*said, *map(_call, message["tool_calls"])))})
        else:
            plain.append(dict(message))
        after_tool = message["role"] == "tool"
    return plain


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments", {}) if isinstance(function, dict) else {}
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function.get("name", "") if isinstance(function, dict) else "", ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {written}}}\n</tool_call>'
