"""Guesses, right and wrong, are part of simulated life; and who would pass a wrong one is found."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from llm_os.drivers.sim import Lone, SimImage
from llm_os.drivers.simulation.faults import FAULTS
from llm_os.drivers.simulation.plan import Options
from llm_os.drivers.simulation.play import play
from llm_os.drivers.simulation.story import Story
from llm_os.drivers.simulation.violation import Violation
from llm_os.kernel import drafting
from llm_os.kernel.drafting import Drafting
from llm_os.kernel.driver import Guess, Sample, Sampled, Sequence
from llm_os.kernel.random import uniform
from llm_os.kernel.request import Request, Sampling


def test_runs_have_right_and_wrong_guesses_with_faults_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    checked = Drafting.checked

    def counting(self: Drafting, process: Any, guesses: int, right: int) -> None:
        kind = "always" if self._always else "auto"
        counts.update({f"{kind} right": right, f"{kind} wrong": guesses - right})
        counts.update({"restored": process.restored, "fork": process.parent is not None})
        checked(self, process, guesses, right)

    monkeypatch.setattr(Drafting, "checked", counting)
    for seed in range(1, 31):
        assert play(seed, Options(steps=700, faults=FAULTS if seed % 2 else ())).failure is None
    assert min(counts[kind] for kind in ("always right", "always wrong")) > 300
    assert min(counts[kind] for kind in ("auto right", "auto wrong", "restored", "fork")) > 5, counts


def test_a_kernel_that_believes_every_guess_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "chosen", lambda fed, row: [row, *row.more])
    failures = (play(seed, Options(steps=400)).failure for seed in range(1, 40))
    assert any(failure is not None for failure in failures)


@pytest.fixture
def story() -> Story:
    request = Request(model="sim:a", prompt="ab", sampling=Sampling(temperature=1.0, max_tokens=9))
    return Story(1, request, 5, 0, SimImage.parse("sim:a"), [97, 98])


def row(*guesses: int, shift: int = 0) -> Sequence:
    samples = [Sample(uniform=uniform(5, 2 + n + shift * (n > 0)), temperature=1.0) for n in range(1 + len(guesses))]
    pairs = tuple(Guess(token, sample) for token, sample in zip(guesses, samples[1:], strict=True))
    return Sequence(pid=1, salt=0, tokens=(97, 98), position=0, pages=(0,), sample=samples[0], guesses=pairs)


def answer(count: int) -> list[int]:
    lone, found = Lone(SimImage.parse("sim:a"), 0, [97, 98]), list[int]()
    for position in range(2, 2 + count):
        found.append(lone.next(Sample(uniform=uniform(5, position), temperature=1.0)))
        lone.feed(found[-1])
    return found


def test_a_story_goes_on_as_far_as_guesses_were_right(story: Story) -> None:
    first, second, third = answer(3)
    fed = row(first, second + 1)
    story.feed(fed, 0.0)
    assert story.ran(fed, Sampled(first, more=(Sampled(second), Sampled(third))), 0.0) == 2
    assert story.answer == [first, second]


def test_a_token_after_a_right_guess_must_be_that_of_a_lone_process(story: Story) -> None:
    first, second = answer(2)
    fed = row(first)
    story.feed(fed, 0.0)
    with pytest.raises(Violation, match="a cell that is not its own"):
        story.ran(fed, Sampled(first, more=(Sampled(second + 1),)), 0.0)


@pytest.mark.parametrize(
    ("fed", "kind"),
    [(row(97, shift=1), "randomness"), (row(97, 256), "guess"), (row(*[97] * 9), "guess")],
)
def test_guesses_with_wrong_luck_beyond_an_end_or_beyond_the_answer_are_found(
    story: Story, fed: Sequence, kind: str
) -> None:
    with pytest.raises(Violation) as violation:
        story.feed(fed, 0.0)
    assert violation.value.kind == kind
