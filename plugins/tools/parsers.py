"""Finds calls of tools in what a model has said. Three ways of writing them; whatever else it says is text.

    hermes    text <tool_call>{"name": …, "arguments": {…}}</tool_call> …      Hermes, Qwen, and where nothing is known
    llama3    <|python_tag|>{"name": …, "parameters": {…}}; {…}                the tag may be missing
    mistral   [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]                  the mark may be missing

A call that is broken is a call with an `error`, for the model to be told. Never evaluates anything; time and memory are
bounded by the length of the text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

from msgspec import Struct

MAX_CALLS = 16  # of one turn; what comes after them is not run
MAX_CALL = 256 * 1024  # characters of one call
MAX_NESTING = 32  # of arguments

_PYTHON_TAG, _TOOL_CALLS, _OPEN, _CLOSE = "<|python_tag|>", "[TOOL_CALLS]", "<tool_call>", "</tool_call>"


class Call(Struct, frozen=True, kw_only=True):
    """What a model asks for."""

    id: str  # "call00000", counted in the conversation
    name: str
    arguments: dict[str, Any] = {}
    error: str | None = None  # why it cannot be run


class Format(Struct, frozen=True):
    """One way of writing calls."""

    name: str
    mark: str  # what begins one
    leads: tuple[str, ...]  # how an answer begins that may be a call as a whole
    parse: Callable[[str], tuple[str, list[Call]]]  # the text around the calls, and the calls; their ids are empty


def _hermes(text: str) -> tuple[str, list[Call]]:
    around: list[str] = []
    calls: list[Call] = []
    at = 0
    while (start := text.find(_OPEN, at)) >= 0:
        around.append(text[at:start])
        value, at, error = _value(text, start + len(_OPEN))
        close = text.find(_CLOSE, at)
        following = text.find(_OPEN, at)
        if close >= 0 and (following < 0 or close < following):
            at = close + len(_CLOSE)
        elif error:
            at = following if following >= 0 else len(text)
        calls.append(_call(value, error))
        if len(calls) > MAX_CALLS:
            return "".join(around).strip(), [*calls[:MAX_CALLS], _broken(f"at most {MAX_CALLS} calls in one turn")]
    if not calls:
        return text, []
    return "".join((*around, text[at:])).strip(), calls


def _llama3(text: str) -> tuple[str, list[Call]]:
    before, tag, rest = text.partition(_PYTHON_TAG)
    if not tag:
        before, rest = "", text
        if not text.lstrip().startswith("{"):
            return text, []
    calls: list[Call] = []
    at = 0
    while rest[at:].strip(" \t\r\n;"):
        at += len(rest[at:]) - len(rest[at:].lstrip(" \t\r\n;"))
        value, at, error = _value(rest, at)
        if not tag and (error or not _is_call(value)):
            return text, []  # JSON that is no call, or no JSON
        calls.append(_call(value, error))
        if error:
            break
        if len(calls) > MAX_CALLS:
            calls[-1] = _broken(f"at most {MAX_CALLS} calls in one turn")
            break
    return (before.strip(), calls) if calls else (text, [])


def _mistral(text: str) -> tuple[str, list[Call]]:
    before, mark, rest = text.partition(_TOOL_CALLS)
    if not mark:
        before, rest = "", text
        if not text.lstrip().startswith("["):
            return text, []
    value, end, error = _value(rest, 0)
    listed = value if isinstance(value, list) else [value]
    if not mark and (error or not listed or rest[end:].strip() or not all(map(_is_call, listed))):
        return text, []
    calls = [_call(one, error) for one in listed[:MAX_CALLS]]
    if len(listed) > MAX_CALLS:
        calls.append(_broken(f"at most {MAX_CALLS} calls in one turn"))
    return (before.strip(), calls) if calls else (text, [])


FORMATS = {
    "hermes": Format("hermes", _OPEN, (), _hermes),
    "llama3": Format("llama3", _PYTHON_TAG, ("{",), _llama3),
    "mistral": Format("mistral", _TOOL_CALLS, ("[{", "[ {", "[\n"), _mistral),
}


# -- JSON of a stranger ------------------------------------------------------------------------------------------------


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant, strict=False)  # models write line ends into strings


def _value(text: str, at: int) -> tuple[Any, int, str | None]:
    """The JSON value there, where it ends, and what is wrong with it."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    try:
        value, end = _decoder.raw_decode(text[at : at + MAX_CALL])
    except (ValueError, RecursionError) as error:
        if len(text) - at > MAX_CALL:
            return None, at, f"the call is longer than {MAX_CALL} characters, or no valid JSON"
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)
        return None, at, f"the call is no valid JSON: {why}"
    if _too_deep(value, MAX_NESTING + 2):
        return None, at + end, f"the call is nested more than {MAX_NESTING} deep"
    return value, at + end, None


def _too_deep(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if depth == 0:
        return True
    return any(_too_deep(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("arguments", value.get("parameters")), dict | str)
    )


def _call(value: Any, error: str | None) -> Call:
    if error is not None:
        return _broken(error)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return _broken('a call must be a JSON object with "name" and "arguments"')
    name = value["name"][:64]
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the object as a string
        arguments, _, error = _value(arguments, 0)
        if error is not None:
            return Call(id="", name=name, error=error)
    if not isinstance(arguments, dict):
        return Call(id="", name=name, error="the arguments must be a JSON object")
    return Call(id="", name=name, arguments=arguments)


def _broken(error: str) -> Call:
    return Call(id="", name="", error=error)
