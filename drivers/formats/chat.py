"""Chat templates: a conversation to the text that a model was trained on. What the sandbox allows is in `sandbox`.

Templates render as transformers' `apply_chat_template` renders them, with `add_generation_prompt`.
A template that knows no tools is told of them in a system message, and what they said in the user's name, in the words
of Hermes and Qwen. Knows nothing of tokens beyond the two texts that it is given.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

from jinja2 import Template, TemplateSyntaxError, UndefinedError

from llm_os.drivers.formats.budget import CHARACTERS, Budget, breadth
from llm_os.drivers.formats.sandbox import FILENAME, Sandbox
from llm_os.drivers.formats.tool_words import tool_names, with_instructions, without_tools
from llm_os.kernel.errors import Error, FormatError, RequestError

MAX_SOURCE = 128 * 1024  # characters
MAX_OUTPUT = 4_000_000  # characters, as many as a tokenizer takes
MAX_MESSAGES = 100_000
MAX_TOOLS = 1024
MAX_NESTING = 32  # of what messages contain
STEPS = 500_000  # units of work (see `sandbox`) for any conversation, and
STEPS_PER_UNIT = 100  # for each unit that the messages weigh

_STRFTIME = re.compile(r"(?:[^%]|%-?[a-zA-Z%])*")


class ChatTemplate:
    """One model's template, compiled once. Immutable; any thread may render."""

    def __init__(self, source: str, *, bos: str, eos: str, file: str) -> None:
        """Raises FormatError, with the line, when the source is no template or longer than MAX_SOURCE."""
        self._bos, self._eos, self._file = bos, eos, file
        if len(source) > MAX_SOURCE:
            raise FormatError(f"{file}: the chat template has {len(source)} characters; the limit is {MAX_SOURCE}")
        self._code = self._compile(source)
        self._knows_tools = "tools" in source

    def _compile(self, source: str) -> CodeType:
        try:
            return Sandbox(Budget(STEPS)).compile_template(source)
        except TemplateSyntaxError as error:
            raise self._broken(error, error.lineno) from None
        except Exception as error:  # deep nesting overflows jinja's and Python's compilers, each with its own error
            raise self._broken(error, None) from None

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt text, ready for the assistant's turn.

        Raises RequestError when messages or tools are malformed, too long, refused by the template or lack what it
        needs; FormatError when the template fails, or exceeds its steps or MAX_OUTPUT.
        """
        conversation, functions = _conversation(messages), _tools(tools)
        if not functions:
            return self._render(conversation, [])
        if self._knows_tools:
            text = self._render(conversation, functions)
            if all(name in text for name in tool_names(functions)):
                return text
        plain = without_tools(conversation)
        try:
            return self._render(with_instructions(plain, functions, "system"), [])
        except RequestError:  # it has no system messages
            return self._render(with_instructions(plain, functions, "user"), [])

    def _render(self, conversation: list[dict[str, Any]], functions: list[Any]) -> str:
        weight = _weight(conversation) + _weight(functions)
        sandbox = Sandbox(Budget(STEPS + STEPS_PER_UNIT * weight))
        sandbox.globals |= {"raise_exception": self._refuse, "strftime_now": _strftime_now}
        values = {
            "messages": conversation,
            "tools": functions or None,
            "documents": None,
            "add_generation_prompt": True,
            "bos_token": self._bos,
            "eos_token": self._eos,
        }
        chunks: list[str] = []
        size = 0
        try:
            template = Template.from_code(sandbox, self._code, sandbox.globals)
            for chunk in template.root_render_func(template.new_context(values)):
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_OUTPUT:
                    raise RequestError(f"the rendered chat has more than {MAX_OUTPUT} characters, which is the limit")
        except Error:
            raise
        except UndefinedError as error:
            if str(error).endswith("is undefined"):
                raise self._broken(error, _line(template, error)) from None
            raise RequestError(f"the chat template of {self._file} needs what no message has: {error}") from None
        except Exception as error:  # whatever Python raises for what a template may do: 1 / 0, [] + "", ...
            raise self._broken(error, _line(template, error)) from None
        return "".join(chunks)

    def _refuse(self, message: Any = "") -> None:
        raise RequestError(f"the chat template of {self._file} refuses the messages: {_one_line(message)}")

    def _broken(self, error: Exception, line: int | None) -> FormatError:
        where = "" if line is None else f", line {line}"
        return FormatError(f"{self._file}: chat template{where}: {_one_line(error) or type(error).__name__}")


def _conversation(messages: Any) -> list[dict[str, Any]]:
    """A deep copy in plain JSON types, which is all that a template gets to see."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise RequestError(f"messages is a {type(messages).__name__}; it must be a list")
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages has {len(messages)} entries; it must have 1 to {MAX_MESSAGES}")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _tools(tools: Any) -> list[Any]:
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise RequestError(f"tools is a {type(tools).__name__}; it must be a list")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries; the limit is {MAX_TOOLS}")
    plain = [_plain(tool, f"tools[{index}]", MAX_NESTING) for index, tool in enumerate(tools)]
    for index, tool in enumerate(plain):
        if not isinstance(tool, dict):
            raise RequestError(f"tools[{index}] is a {type(tools[index]).__name__}; it must be an object")
    return plain


def _message(message: Any, field: str) -> dict[str, Any]:
    plain = _plain(message, field, MAX_NESTING)
    if not isinstance(plain, dict):
        raise RequestError(f"{field} is a {type(message).__name__}; it must be an object with role and content")
    if not isinstance(plain.get("role"), str):
        raise RequestError(f"{field}.role is missing or no string")
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = _text(content, f"{field}.content")
    elif not isinstance(content, str) and not (content is None and plain.get("tool_calls")):
        raise RequestError(f"{field}.content is missing, or neither a string nor a list of parts")
    return plain


def _text(parts: list[Any], field: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f'{field}[{index}] must be {{"type": "text", "text": ...}}; the model reads only text')
        texts.append(part["text"])
    return "\n".join(texts)


def _plain(value: Any, field: str, depth: int) -> Any:
    if value is None or type(value) in (str, bool, int, float):
        return value
    if depth == 0:
        raise RequestError(f"{field} is nested more than {MAX_NESTING} deep")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{field}.{str(key)[:80]}", depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{field}[{index}]", depth - 1) for index, item in enumerate(value)]
    if isinstance(value, str):
        return str.__str__(value)
    raise RequestError(f"{field} is a {type(value).__name__}; messages hold only what JSON can say")


def _weight(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return breadth(value) + sum(map(_weight, inner))


def _strftime_now(form: str) -> str:
    if len(form) > CHARACTERS or not _STRFTIME.fullmatch(form):
        raise ValueError("strftime_now takes plain directives such as '%d %b %Y'")
    return time.strftime(form)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:300]


def _line(template: Template, error: Exception) -> int | None:
    """The line of the template that was at work."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == FILENAME:
            line = template.get_corresponding_lineno(frame.tb_lineno)
        frame = frame.tb_next
    return line
