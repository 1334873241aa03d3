"""How the plugin `redact` numbers what it takes out, and what comes back: whatever an answer's pieces are."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llm_os
from llm_os.plugins.redact.answer import HELD, Answer, Restorer, Screen
from llm_os.plugins.redact.filter import Redaction
from llm_os.plugins.redact.finder import Finder
from llm_os.plugins.redact.mapping import Mapping
from llm_os.plugins.redact.options import Options

FRAGMENTS = (
    "alice@example.com", "bob@example.org", "+49 170 1234567", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00",
    "My name is Alice Smith", "Dear Mr. Jones,", "born on 12 March 1985", "password: hunter2!", "192.168.17.4",
    "<EMAIL_1>", "<EMAIL_2>", "<TEXT_1>", "<NATIONAL_ID_999999>",
    "<EMAIL_", "<", ">", "1>", "_1", " ", "\n", "\n\n", "and", "we met", "Alice",
    "Smith", "4111", "Paris", "van", "12", "我叫王小明，", "谢谢", "１２", "\u200b", "x" * 70, "Aa " * 40, "1 " * 140,
)  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=8)), max_size=14).map("".join)


@cache
def finder() -> Finder:
    return Finder(Options())


def mapping(text: str) -> tuple[Mapping, str]:
    mapping = Mapping(finder())
    return mapping, mapping.redact(text)


def answer(values: dict[str, str], screened: bool) -> Answer:
    return Answer(Restorer(finder(), values), Screen(finder()) if screened else None)


def whole(values: dict[str, str], screened: bool, text: str) -> str:
    through = answer(values, screened)
    return through.push(text) + through.flush()


@given(TEXTS)
@example("<EMAIL_1> alice@example.com <TEXT_1>")
@settings(deadline=None, max_examples=300)
def test_what_is_taken_out_comes_back_whatever_the_text(text: str) -> None:
    taken, redacted = mapping(text)
    assert whole(taken.values, False, redacted) == text
    assert set(finder().placeholder.findall(redacted)) == set(taken.values)  # none is the user's own


@given(TEXTS, st.lists(st.integers(0, 400), max_size=12), st.booleans())
@settings(deadline=None, max_examples=400)
def test_however_an_answer_is_cut_the_same_comes_out_and_little_is_held_back(
    text: str, cuts: list[int], screened: bool
) -> None:
    values = {"<EMAIL_1>": "alice@example.com", "<TEXT_1>": "<EMAIL_1>", "<NATIONAL_ID_999999>": "12345678Z"}
    expected = whole(values, screened, text)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for pieces in ([text[a:b] for a, b in itertools.pairwise(places)], list(text)):
        through, shown, came = answer(values, screened), "", 0
        for piece in pieces:
            shown += through.push(piece)
            came += len(piece)
            held = len(through._restorer._held) + (len(through._screen._held) if through._screen else 0)
            assert held < finder().longest + (HELD if screened else 0)
        assert shown + through.flush() == expected


@given(st.lists(TEXTS, min_size=1, max_size=5))
@settings(deadline=None, max_examples=100)
def test_a_conversation_that_grows_begins_as_it_did(texts: list[str]) -> None:
    roles = itertools.cycle(("user", "assistant"))
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    longest = sent(messages)
    for size in range(1, len(messages)):
        assert sent(messages[:size]) == longest[:size]


def sent(messages: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """What the model sees of them."""
    opened = Redaction(Options(**options)).open(llm_os.Request(model="m", messages=messages)) if messages else None
    changed = messages if opened is None else opened[0].messages
    assert changed is not None
    return changed


def test_an_answer_that_comes_back_in_the_next_turn_is_what_the_model_wrote() -> None:
    asked = [{"role": "user", "content": "My name is Alice Smith (alice@example.com). Greet me."}]
    opened = Redaction(Options()).open(llm_os.Request(model="m", messages=asked))
    assert opened is not None and opened[1] is not None
    wrote = "Hello <NAME_1>! Is <EMAIL_1> still right, <NAME_1>?"
    shown = opened[1].push(wrote) + opened[1].flush()
    assert shown == "Hello Alice Smith! Is alice@example.com still right, Alice Smith?"
    again = sent([*asked, {"role": "assistant", "content": shown}, {"role": "user", "content": "Yes."}])
    assert [message["content"] for message in again[1:]] == [wrote, "Yes."]


def test_a_value_keeps_its_placeholder_and_another_gets_the_next() -> None:
    _, redacted = mapping("a@b.org, c@d.org, a@b.org; then a@b.org and +49 170 1234567")
    assert redacted == "<EMAIL_1>, <EMAIL_2>, <EMAIL_1>; then <EMAIL_1> and <PHONE_1>"


def test_a_name_that_was_given_once_is_taken_out_wherever_it_stands() -> None:
    _, redacted = mapping("Ask Alice Smith. My name is Alice Smith, and Alice Smithson is another.")
    assert redacted == "Ask <NAME_1>. My name is <NAME_1>, and Alice Smithson is another."
    said = sent(
        [{"role": "user", "content": "My name is Alice Smith."}, {"role": "user", "content": "Greet Alice Smith."}]
    )
    assert said[1]["content"] == "Greet <NAME_1>."
    _, redacted = mapping("我叫王小明，王小明今年三十岁")
    assert redacted == "我叫<NAME_1>，<NAME_1>今年三十岁"


def test_a_placeholder_that_the_user_types_brings_nobody_elses_data() -> None:
    taken, redacted = mapping("My mail is alice@example.com. What is <EMAIL_1>? And <TEXT_1>, <EMAIL_9>, <STEP_1>?")
    assert redacted == "My mail is <EMAIL_1>. What is <TEXT_1>? And <TEXT_2>, <TEXT_3>, <STEP_1>?"
    assert whole(taken.values, False, "You wrote <TEXT_1>: <EMAIL_1>") == "You wrote <EMAIL_1>: alice@example.com"


def test_a_placeholder_that_stands_for_nothing_stays_as_it_is() -> None:
    assert whole({"<EMAIL_1>": "a@b.org"}, True, "<EMAIL_2> <EMAIL_01> <NAME_1> < EMAIL_1 > <EMAIL_1>") == (
        "<EMAIL_2> <EMAIL_01> <NAME_1> < EMAIL_1 > a@b.org"
    )


def test_personal_data_that_the_model_made_up_goes_and_the_readers_own_stays() -> None:
    wrote = "Dear Mr. Jones, write to <EMAIL_1> or carol@example.net, call +49 170 1234567. Born on 12 March 1985."
    shown = whole({"<EMAIL_1>": "alice@example.com"}, True, wrote)
    assert shown == "Dear Mr. <NAME>, write to alice@example.com or <EMAIL>, call <PHONE>. Born on <BIRTHDATE>."
    assert whole({"<EMAIL_1>": "alice@example.com"}, False, "carol@example.net") == "carol@example.net"


def test_every_part_of_a_request_is_redacted() -> None:
    mail = "alice@example.com"
    parts = [{"type": "text", "text": f"I am {mail}"}, {"type": "text", "text": mail}]
    arguments = {"to": [mail], mail: {"card": 4111111111111111, "n": 17}}
    written = '{"to": "alice\\u0040example.com", "text": "line\\nalice@example.com"}'
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": f"Serve {mail}."},
        {"role": "user", "name": mail, "content": parts},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "send", "arguments": arguments}},
                {"function": {"name": "send", "arguments": written}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": f'{{"sent": "{mail}"}}'},
    ]
    request = llm_os.Request(model="m", messages=messages)
    opened = Redaction(Options()).open(request)
    assert opened is not None
    assert opened[0].messages == [
        {"role": "system", "content": "Serve <EMAIL_1>."},
        {
            "role": "user",
            "name": "<EMAIL_1>",
            "content": [{"type": "text", "text": "I am <EMAIL_1>"}, {"type": "text", "text": "<EMAIL_1>"}],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {
                        "name": "send",
                        "arguments": {"to": ["<EMAIL_1>"], "<EMAIL_1>": {"card": "<CARD_1>", "n": 17}},
                    },
                },
                {"function": {"name": "send", "arguments": '{"to":"<EMAIL_1>","text":"line\\n<EMAIL_1>"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"sent": "<EMAIL_1>"}'},
    ]
    assert request.messages == messages and messages[0]["content"] == f"Serve {mail}."  # the caller's own is as it was


def test_a_request_without_personal_data_is_left_alone() -> None:
    assert Redaction(Options()).open(llm_os.Request(model="m", prompt="What is the capital of France?")) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": [1, 2, 3]}, "token ids.*send it as text"),
        ({"prompt": "x" * 101}, "more than 100 characters.*max_characters"),
        ({"messages": [{"role": "user", "content": "x" * 60}] * 2}, "more than 100 characters"),
        ({"messages": [{"role": "user", "content": b"alice@example.com"}]}, "hold a bytes"),
    ],
)
def test_what_cannot_be_redacted_is_refused_and_the_error_quotes_nothing(fields: Any, message: str) -> None:
    with pytest.raises(llm_os.RequestError, match=message) as caught:
        Redaction(Options(max_characters=100)).open(llm_os.Request(model="m", **fields))
    assert "alice" not in str(caught.value) and "\n" not in str(caught.value)


def test_nesting_without_end_is_refused() -> None:
    deep: Any = "alice@example.com"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(llm_os.RequestError, match="more than 32 deep"):
        Redaction(Options()).open(llm_os.Request(model="m", messages=[{"role": "user", "content": deep}]))
