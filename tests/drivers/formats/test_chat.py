"""Chat templates of the known families, rendered as transformers renders them, and what malformed messages say."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llm_os.drivers.formats.chat import MAX_SOURCE, ChatTemplate
from llm_os.kernel.errors import FormatError, RequestError

FAMILIES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parents[2] / "data" / "chat_templates").iterdir())
}
SMOLLM2 = FAMILIES["smollm2"]
USER = {"role": "user", "content": "  Hi <b>&amp;</b> 'you'\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [USER],
    "with a system message": [{"role": "system", "content": "Be brief."}, USER],
    "several turns": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello! "},
        {"role": "user", "content": "你好 😀"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": ""},
    ],
    "one that ends with the assistant": [USER, {"role": "assistant", "content": "Sure,"}],
}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos="<s>", eos="</s>", file="x.gguf")


def by_transformers(source: str, messages: list[dict[str, Any]]) -> str:
    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    return str(rendered[0])


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_render_as_transformers_renders_them(family: str, conversation: str) -> None:
    source, messages = FAMILIES[family], CONVERSATIONS[conversation]
    assert template(source).render(messages) == by_transformers(source, messages)


def test_tool_calls_render_as_transformers_renders_them() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"b": "<1>", "a": [1, None]}}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7"},
    ]
    for family in ("llama3", "qwen3"):
        assert template(FAMILIES[family]).render(messages) == by_transformers(FAMILIES[family], messages)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    joined = template(SMOLLM2).render([{"role": "user", "content": parts}])
    assert joined == template(SMOLLM2).render([{"role": "user", "content": "one\ntwo"}])


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    template(SMOLLM2).render(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


def test_the_date_is_todays() -> None:
    before = time.strftime("%d %b %Y")
    shown = template("{{ strftime_now('%d %b %Y') }}").render([USER])
    assert shown in (before, time.strftime("%d %b %Y"))


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ("Hi", "messages is a str"),
        ({"role": "user", "content": "Hi"}, "messages is a dict"),
        ([], "messages has 0 entries"),
        (["Hi"], "messages[0] is a str"),
        ([USER, {"content": "Hi"}], "messages[1].role"),
        ([{"role": 1, "content": "Hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": "user", "content": ["Hi"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([USER | {"extra": object()}], "messages[0].extra is a object"),
        ([USER | {"extra": {"a": [b""]}}], "messages[0].extra.a[0] is a bytes"),
    ],
)
def test_malformed_messages_name_the_field(messages: Any, field: str) -> None:
    with pytest.raises(RequestError) as failure:
        template(SMOLLM2).render(messages)
    assert field in str(failure.value)
    assert "\n" not in str(failure.value)


def test_messages_nested_too_deep_are_refused() -> None:
    deep: Any = "x"
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(RequestError, match="nested"):
        template(SMOLLM2).render([USER | {"extra": deep}])


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(RequestError, match=r"x\.gguf refuses the messages: .*alternate"):
        template(FAMILIES["gemma3"]).render([USER, USER])


def test_a_refusal_is_one_line() -> None:
    with pytest.raises(RequestError) as failure:
        template("{{ raise_exception('a\nb' * 1000) }}").render([USER])
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 500


def test_a_field_that_no_message_has_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="'name'"):
        template("{{ 'a' + messages[0]['name'] }}").render([USER])


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("a\nb\n{% if %}", 3),
        ("\n{{ messages", 2),
        ("\n\n{% nosuchtag %}", 3),
        ("\n{{ 'x'|nosuchfilter }}", 2),
        ("{% for m in messages %}", 1),
        ("{{ '\n", 1),
    ],
)
def test_what_is_no_template_names_the_line_at_once(source: str, line: int) -> None:
    with pytest.raises(FormatError, match=rf"^x\.gguf: chat template, line {line}: [^\n]+$"):
        template(source)


def test_what_fails_while_rendering_names_the_line() -> None:
    with pytest.raises(FormatError, match=r"^x\.gguf: chat template, line 3: division by zero$"):
        template("a\n\n{{ 1 / 0 }}").render([USER])
    with pytest.raises(FormatError, match=r"^x\.gguf: chat template, line 2: 'nosuch' is undefined$"):
        template("\n{{ nosuch + 1 }}").render([USER])


def test_a_template_past_the_limit_is_refused() -> None:
    with pytest.raises(FormatError, match=str(MAX_SOURCE)):
        template("a" * (MAX_SOURCE + 1))


def test_one_template_serves_many_threads() -> None:
    shared = template(FAMILIES["every_feature"])
    expected = {name: shared.render(messages) for name, messages in CONVERSATIONS.items()}
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(20):
            if shared.render(CONVERSATIONS[name]) != expected[name]:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in CONVERSATIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
