"""Work that leads nowhere is found: failures in a row, loads without a batch, tokens fed again and again."""

from __future__ import annotations

from typing import Any

import pytest

from llm_os.drivers.sim import SimImage
from llm_os.drivers.simulation.pace import HOT, LOADS, Pace
from llm_os.drivers.simulation.story import Story
from llm_os.drivers.simulation.violation import Violation
from llm_os.kernel import events as ev
from llm_os.kernel.driver import Extent, Placement, Sequence
from llm_os.kernel.request import Request

IMAGE = SimImage.parse("sim:a")
LOAD = ev.Load(1, "a", IMAGE, Placement(extents=(Extent(0, 1),), page_tokens=1, pages=1))
DEMOTE = ev.Demote(2, "", (1,))


def feeding(*, end: int) -> Sequence:
    return Sequence(pid=1, salt=0, tokens=(1,) * end, position=0, pages=(0,), sample=None)


@pytest.fixture
def pace() -> Pace:
    return Pace()


def test_one_operation_that_fails_for_ever_is_a_hot_loop(pace):
    with pytest.raises(Violation, match="hot loop: Demote"):
        for _ in range(HOT + 1):
            pace.failed(DEMOTE)


@pytest.mark.parametrize("between", ["asked", "succeeded"])
def test_failures_with_something_between_them_are_none(pace, between):
    for _ in range(3 * HOT):
        pace.failed(DEMOTE)
        pace.asked() if between == "asked" else pace.succeeded(LOAD)
        pace.progress()


def test_loads_without_a_batch_are_found(pace):
    with pytest.raises(Violation, match="thrash"):
        for _ in range(LOADS + 1):
            pace.succeeded(LOAD)


def test_tokens_that_are_fed_again_for_ever_are_found(pace):
    live: list[Any] = [Story(1, Request(model="sim:a", prompt="a"), 0, 0, IMAGE, [1] * 40)]
    with pytest.raises(Violation, match="livelock"):
        for _ in range(20):
            pace.fed(feeding(end=40), live)


def test_who_gets_one_token_on_each_time_does_not_livelock(pace):
    live: list[Any] = [Story(1, Request(model="sim:a", prompt="a"), 0, 0, IMAGE, [1] * 40)]
    for end in range(1, 400):
        pace.fed(feeding(end=end), live)
