"""A real model under a grammar. `LLM_OS_TEST_ANSWERS=100` asks for more answers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import llm_os

ANSWERS = int(os.environ.get("LLM_OS_TEST_ANSWERS", "12"))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def kernel() -> Iterator[llm_os.Kernel]:
    with llm_os.Kernel(llm_os.Config(driver="cpu", precision="exact", memory="1536MiB")) as kernel:
        yield kernel


def ask(model: Path, n: int, kind: str | None = "json_schema", source: str = json.dumps(SCHEMA), **fields: Any) -> Any:
    grammar = None if kind is None else llm_os.Grammar(kind=kind, source=source)  # type: ignore[arg-type]
    sampling = llm_os.Sampling(**{"max_tokens": 160, "temperature": 1.0, "seed": n, "grammar": grammar, **fields})
    messages = [{"role": "user", "content": f"Invent person number {n}, as JSON."}]
    return llm_os.Request(model=str(model), messages=messages, sampling=sampling)


def answer(kernel: llm_os.Kernel, *requests: llm_os.Request) -> list[llm_os.Completion]:
    """All at once."""
    streams = [kernel.stream(request) for request in requests]

    async def collect() -> list[llm_os.Completion]:
        return [await stream.collect() for stream in streams]

    return anyio.run(collect)


def test_every_answer_at_temperature_1_is_valid_json(kernel: llm_os.Kernel, smollm2: Path) -> None:
    for said in answer(kernel, *(ask(smollm2, n) for n in range(ANSWERS))):
        value = json.loads(said.text)
        assert said.finish_reason == "stop" and list(value) == ["name", "age", "tags"]
        assert len(value["name"]) <= 16 and 0 <= value["age"] <= 120 and isinstance(value["age"], int)
        assert len(value["tags"]) <= 3 and all(isinstance(tag, str) and len(tag) <= 10 for tag in value["tags"])


def test_a_neighbour_of_a_constrained_request_answers_as_without_it(kernel: llm_os.Kernel, smollm2: Path) -> None:
    free, bound = ask(smollm2, 5, None, max_tokens=24, logprobs=2), ask(smollm2, 6, "regex", "[a-z]{3,8} is [0-9]{2}")
    (lone,), (alone,) = answer(kernel, free), answer(kernel, bound)
    company = answer(kernel, free, bound, ask(smollm2, 7, "regex", "(yes|no){4}"))
    assert company[0].token_ids == lone.token_ids and company[0].logprobs == lone.logprobs
    assert company[1].token_ids == alone.token_ids and re.fullmatch("[a-z]{3,8} is [0-9]{2}", alone.text)
    assert re.fullmatch("(yes|no){4}", company[2].text)


def test_text_of_several_bytes_a_character_is_whole(kernel: llm_os.Kernel, smollm2: Path) -> None:
    (said,) = answer(kernel, ask(smollm2, 1, "regex", "[äöüß€漢😀]{6}", temperature=2.0))
    assert re.fullmatch("[äöüß€漢😀]{6}", said.text) and said.finish_reason == "stop"


def test_samples_and_greedy_answers_with_penalties_match(kernel: llm_os.Kernel, smollm2: Path) -> None:
    pattern = r"(red|green|blue)(, (red|green|blue)){2,4}\."
    request = ask(smollm2, 1, "regex", pattern, temperature=0, repetition_penalty=1.3, logit_bias={0: 50.0, 2: 50.0})
    answers = answer(kernel, request)

    async def collect() -> list[llm_os.Completion]:
        return [await stream.collect() for stream in kernel.samples(ask(smollm2, 1, "regex", pattern), 3)]

    for said in (*answers, *anyio.run(collect)):
        assert re.fullmatch(pattern, said.text), said.text


def test_a_chat_ends_with_the_end_of_a_turn_and_a_raw_text_with_the_end_of_text(
    kernel: llm_os.Kernel, smollm2: Path
) -> None:
    grammar = llm_os.Grammar(kind="regex", source="(one|two)")
    sampling = llm_os.Sampling(max_tokens=9, seed=1, grammar=grammar, logit_bias={2: 1000.0})  # <|im_end|>
    raw = llm_os.Request(model=str(smollm2), prompt="One or two?", sampling=sampling)
    said = answer(kernel, raw, ask(smollm2, 1, "regex", "(one|two)"))
    assert [completion.finish_reason for completion in said] == ["stop", "stop"]
    assert said[0].token_ids[-1] == 0 and said[1].token_ids[-1] in (0, 2)
