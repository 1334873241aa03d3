"""Speculation leaves the distribution of answers as it is: the real sampler, many seeds, and what they should give.

The model is a table: the logits after a token depend on that token only, so the chances of each answer are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from llm_os import DraftContext, Sample, Sampled
from llm_os.drivers.sim import SimDriver
from llm_os.drivers.torch.sampler import sample, scores_of
from llm_os.testing import Machine

LETTERS = b"abcd"
LENGTH, SEEDS = 3, 3000


class TableDriver(SimDriver):
    """A device that chooses as the torch drivers do, from logits after the last token."""

    def _row(self, model: str, image: Any, size: int, rows: Any) -> Any:
        super()._row(model, image, size, rows)
        samples = [rows.sample, *(guess.sample for guess in rows.guesses)]
        fed = [rows.tokens[-1], *(guess.token for guess in rows.guesses)]
        guesses = [None, *(guess.token for guess in rows.guesses)]
        first, *more = sample(scores_of(torch.stack([logits(token) for token in fed])), samples, guesses)
        return Sampled(first.token, more=tuple(row for row in more if row is not None))  # type: ignore[union-attr]


def logits(token: int) -> torch.Tensor:
    row = torch.full((257,), -50.0)
    for n, letter in enumerate(LETTERS):
        row[letter] = [1.5, 0.5, -0.5, 1.0][(n + token) % 4]
    return row


class Likely:
    """Guesses the likeliest letters; right about two times in five."""

    def open(self, context: DraftContext) -> Likely:
        return Likely()

    def __init__(self) -> None:
        self._last = 0

    def guess(self, new: Sequence[int], limit: int) -> list[int]:
        self._last = new[-1]
        found = [int(logits(self._last).argmax())]
        while len(found) < limit:
            found.append(int(logits(found[-1]).argmax()))
        return found


def answers(speculation: str, sampling: dict[str, Any]) -> tuple[list[bytes], int]:
    """Of all seeds, and how many guesses were right."""
    machine = Machine(drafters=[Likely()], speculation=speculation, queue_limit=SEEDS + 1, batch_size=64)
    machine.driver = TableDriver(machine.config)
    for pid in range(1, SEEDS + 1):
        machine.submit(pid, "a", sampling={"max_tokens": LENGTH, "temperature": 1.0, **sampling})
        if pid % 64 == 0:
            machine.settle()
    machine.settle()
    right = sum(machine.deliveries[pid][-1].completion.usage.accepted_tokens for pid in range(1, SEEDS + 1))
    return [bytes(machine.tokens(pid)) for pid in range(1, SEEDS + 1)], right


def chances(temperature: float, top_k: int) -> dict[bytes, float]:
    """Of each answer to "a"."""
    found = {}
    for answer in product(LETTERS, repeat=LENGTH):
        chance, before = 1.0, ord("a")
        for token in answer:
            scores = logits(before).double().numpy()[list(LETTERS)] / temperature
            kept = scores >= np.sort(scores)[-top_k]
            weights = np.exp(scores) * kept
            chance *= weights[LETTERS.index(token)] / weights.sum()
            before = token
        found[bytes(answer)] = chance
    return found


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 4), (2.0, 3)])
def test_sampling_with_guesses_gives_each_answer_as_often_as_without(temperature: float, top_k: int) -> None:
    sampling = {"temperature": temperature, "top_k": top_k}
    speculated, right = answers("always", sampling)
    plain, none = answers("off", sampling)
    assert right > SEEDS // 2 and none == 0
    assert speculated == plain, "each seed gives its own answer, whatever was guessed"
    counts, expected = Counter(speculated), chances(temperature, top_k)
    assert all(expected[answer] > 0 for answer in counts)
    distance = sum((counts[a] - SEEDS * p) ** 2 / (SEEDS * p) for a, p in expected.items() if p > 0)
    freedom = sum(p > 0 for p in expected.values()) - 1
    assert abs(distance - freedom) < 4 * (2 * freedom) ** 0.5, "chi-square, four standard deviations"


def test_greedy_answers_are_those_without_guesses() -> None:
    sampling = {"temperature": 0.0}
    assert answers("always", sampling)[0] == answers("off", sampling)[0]
    assert Sample(uniform=0.5).temperature == 0
