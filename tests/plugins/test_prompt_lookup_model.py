"""A real model with guesses from its own text: the same ids as without, in fewer steps; sampled, in a grammar, too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_os

CODE = '''class Rectangle:
    """A rectangle of a width and a height."""

    def __init__(self, width, height):
        self.width = width
        self.height = height

    def area(self):
        return self.width * self.height

'''
PROSE = (
    "The lighthouse stands on a small rock, a mile from the harbour. Every evening the keeper climbs the stairs, "
    "lights the lamp, and writes the weather into a book. In winter nobody comes for weeks.\n\n"
)
PEOPLE = [{"name": "Ada Lovelace", "city": "London"}, {"name": "Grace Hopper", "city": "New York"}]
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {name: {"enum": [person[name] for person in PEOPLE]} for name in ("name", "city")},
        "required": ["name", "city"],
        "additionalProperties": False,
    },
    "minItems": 2,
    "maxItems": 2,
}


@pytest.fixture(scope="module")
def kernels() -> Iterator[dict[str, llm_os.Kernel]]:
    def boot(speculation: Any) -> llm_os.Kernel:
        config = llm_os.Config(driver="cpu", precision="exact", memory="1GiB", speculation=speculation)
        return llm_os.Kernel(config)

    with boot("always") as always, boot("off") as off:
        yield {"always": always, "off": off}


def compare(kernels: dict[str, llm_os.Kernel], *requests: llm_os.Request) -> list[llm_os.Completion]:
    """The answers with guesses, all at once: they must be those without, one by one."""
    alone = [kernels["off"].stream(request).result() for request in requests]
    streams = [kernels["always"].stream(request) for request in requests]
    together = [stream.result() for stream in streams]
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids and one.text == other.text
        assert one.finish_reason == other.finish_reason and one.logprobs == other.logprobs
        assert one.usage.drafted_tokens == 0
    return together


def quoting(model: Path, text: str, count: int, **sampling: Any) -> llm_os.Request:
    """It has read the text twice, and begins it again."""
    options = llm_os.Sampling(**{"max_tokens": count, "temperature": 0, "seed": 11, **sampling})
    return llm_os.Request(model=str(model), prompt=text + text + text[:24], sampling=options)


def test_quoted_text_takes_a_fraction_of_the_steps_and_has_the_same_ids(
    kernels: dict[str, llm_os.Kernel], smollm2: Path
) -> None:
    for completion in compare(kernels, quoting(smollm2, CODE, 32), quoting(smollm2, PROSE, 24)):
        usage = completion.usage
        steps = usage.completion_tokens - usage.accepted_tokens
        assert steps * 3 <= usage.completion_tokens, usage


def test_sampled_text_has_the_same_ids_and_log_probabilities(kernels: dict[str, llm_os.Kernel], smollm2: Path) -> None:
    requests = [
        quoting(smollm2, CODE, 20, temperature=0.8, seed=1, logprobs=2),
        quoting(smollm2, PROSE, 20, temperature=1.2, seed=2, top_p=0.9),
        quoting(smollm2, PROSE, 20, temperature=0.7, seed=3, repetition_penalty=1.2, frequency_penalty=0.3),
    ]
    answers = compare(kernels, *requests)
    drafted = sum(each.usage.drafted_tokens for each in answers)
    accepted = sum(each.usage.accepted_tokens for each in answers)
    assert 0 < accepted < drafted, "some guesses were right, and some were wrong"


def test_an_answer_in_a_grammar_is_the_same_and_matches_it(kernels: dict[str, llm_os.Kernel], smollm2: Path) -> None:
    grammar = llm_os.Grammar(kind="json_schema", source=json.dumps(SCHEMA))
    text = f"As JSON: {json.dumps(PEOPLE)}\nAgain: "
    requests = [
        llm_os.Request(
            model=str(smollm2),
            prompt=text,
            sampling=llm_os.Sampling(max_tokens=120, temperature=temperature, seed=4, grammar=grammar),
        )
        for temperature in (0.0, 1.0)
    ]
    for completion in compare(kernels, *requests):
        assert completion.finish_reason == "stop" and len(json.loads(completion.text)) == 2
        assert completion.usage.accepted_tokens > 10
