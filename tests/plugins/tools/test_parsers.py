"""Calls in what a model says: the three ways of writing them, what is broken, and what is hostile."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_os.plugins.tools.parsers import FORMATS, MAX_CALLS, Call
from llm_os.plugins.tools.turns import Turn

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True)
arguments = st.dictionaries(st.text(max_size=8) | st.just("</tool_call>"), json_values, max_size=4)
calls = st.lists(st.tuples(names, arguments), min_size=1, max_size=4)


def written(format: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    key = "parameters" if format == "llama3" else "arguments"
    texts = [json.dumps({"name": name, key: value}, ensure_ascii=False) for name, value in calls]
    match format:
        case "hermes":
            return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
        case "llama3":
            return "; ".join(texts)
        case _:
            return f"[TOOL_CALLS] [{', '.join(texts)}]"


def pairs(calls: list[Call]) -> list[tuple[str, dict[str, Any]]]:
    assert [call.error for call in calls] == [None] * len(calls)
    return [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("format", FORMATS)
@given(calls=calls)
@settings(max_examples=60, deadline=None)
def test_calls_are_read_as_they_were_written(format: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    text, read = FORMATS[format].parse(written(format, calls))
    assert (text, pairs(read)) == ("", calls)


@pytest.mark.parametrize("format", FORMATS)
@given(calls=calls, cuts=st.lists(st.integers(0, 400), max_size=8))
@settings(max_examples=60, deadline=None)
def test_nothing_of_a_call_is_shown_however_it_is_cut(
    format: str, calls: list[tuple[str, dict[str, Any]]], cuts: list[int]
) -> None:
    before = "" if format == "llama3" else "I look. "
    whole = before + written(format, calls)
    turn, shown, at = Turn(FORMATS[format]), "", 0
    for cut in [*sorted(cuts), len(whole)]:
        shown += turn.push(whole[at:cut])
        at = max(at, cut)
    assert shown == before
    rest, text, read = turn.finish()
    assert (rest, text, pairs(read)) == ("", before.strip(), calls)


@pytest.mark.parametrize("format", FORMATS)
@given(text=st.text(max_size=60), cut=st.integers(0, 60))
def test_text_without_calls_is_shown_whole(format: str, text: str, cut: int) -> None:
    turn = Turn(FORMATS[format])
    shown = turn.push(text[:cut]) + turn.push(text[cut:])
    rest, said, calls = turn.finish()
    if not calls:
        assert shown + rest == said == text


PIECES = [
    '{"name": "f", "arguments": {}}',
    '{"name": "f", "parameters": {"a": [1, {"b": "}"}]}}',
    "<tool_call>",
    "</tool_call>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    '"',
    "\\",
    "[",
    "]",
    "{",
    "}",
    ";",
    " ",
    "\n",
    "NaN",
    "x",
    "\u202e",
    "\ud800",
]


@pytest.mark.parametrize("format", FORMATS)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=30))
@settings(max_examples=200, deadline=None)
def test_whatever_a_model_says_is_read_without_an_error(format: str, pieces: list[str]) -> None:
    text, calls = FORMATS[format].parse("".join(pieces))
    assert isinstance(text, str) and len(calls) <= MAX_CALLS + 1
    assert all(call.error or isinstance(call.arguments, dict) for call in calls)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "hostile",
    [
        '{"name": "f", "arguments": ' + '{"a":' * 100_000,
        '{"name": "f", "arguments": {"a": ' + "[" * 50 + "]" * 50 + "}}",
        '{"name": "f", "arguments": {"a": ' + "9" * 10_000 + "}}",
        '{"name": "f", "arguments": {"a": "' + "x" * 2_000_000,
        '{"name": "f", "arguments": {"a": Infinity}}',
        '{"name": ["f"], "arguments": {}}',
        '{"name": "f", "arguments": [1, 2]}',
        '{"name": "f", "arguments": "__import__(\'os\').abort()"}',
    ],
    ids=["deep", "nested", "digits", "endless", "infinity", "no name", "a list", "python"],
)
def test_hostile_calls_are_errors_that_are_told(format: str, hostile: str) -> None:
    _, calls = FORMATS[format].parse(FORMATS[format].mark + hostile)
    assert len(calls) == 1 and calls[0].error and "\n" not in calls[0].error


@pytest.mark.parametrize("format", FORMATS)
def test_more_calls_than_are_sensible_are_not_read(format: str) -> None:
    many = written(format, [("f", {})] * 1000)
    _, calls = FORMATS[format].parse(many)
    assert len([call for call in calls if call.error is None]) <= MAX_CALLS
    assert "at most 16 calls" in str(calls[-1].error)


def test_text_around_calls_stays_and_broken_calls_hide_no_others() -> None:
    good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text, calls = FORMATS["hermes"].parse(f"one {good} two <tool_call>{{'name'</tool_call> three {good} four")
    assert text.split() == ["one", "two", "three", "four"]
    assert [call.name for call in calls] == ["f", "", "f"]
    assert "no valid JSON" in str(calls[1].error)


def test_a_call_that_was_never_closed_is_read() -> None:
    _, calls = FORMATS["hermes"].parse('<tool_call>\n{"name": "f", "arguments": {"a": 1}}}')
    assert pairs(calls) == [("f", {"a": 1})]


def test_line_ends_in_strings_are_read_as_they_are() -> None:
    _, calls = FORMATS["hermes"].parse('<tool_call>{"name": "f", "arguments": {"a": "one\ntwo"}}</tool_call>')
    assert pairs(calls) == [("f", {"a": "one\ntwo"})]


def test_arguments_may_be_written_as_a_string() -> None:
    _, calls = FORMATS["hermes"].parse('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>')
    assert pairs(calls) == [("f", {"a": 1})]


@pytest.mark.parametrize(
    "text", ['{"name": "Bob", "age": 7}', "{not JSON", "[1, 2]", '[{"name": "Bob"}]', "[a link](x)"]
)
def test_json_that_is_no_call_is_an_answer(text: str) -> None:
    for format in ("llama3", "mistral"):
        assert FORMATS[format].parse(text) == (text, [])


def test_marks_may_be_missing_where_tokens_are_not_shown() -> None:
    assert pairs(FORMATS["mistral"].parse('[{"name": "f", "arguments": {"a": 1}}]')[1]) == [("f", {"a": 1})]
    assert pairs(FORMATS["llama3"].parse('<|python_tag|>{"name": "f", "parameters": {}}')[1]) == [("f", {})]
