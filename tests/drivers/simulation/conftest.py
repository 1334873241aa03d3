"""A machine's parts, with the faults that a test wants and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llm_os.drivers.simulation.chooser import Chooser
from llm_os.drivers.simulation.disk import SimFiles
from llm_os.drivers.simulation.faults import Faults


class Planned(Faults):
    """Strikes when the test says so: `plan["write"] = "io_error"` at the next write, and every one after it."""

    def __init__(self) -> None:
        super().__init__(Chooser(0), ())
        self.plan: dict[str, str] = {}

    def at(self, place: str) -> str | None:
        return self.plan.get(place)


class Scripted(Chooser):
    """Chooses what the test says, by default the most."""

    def __init__(self) -> None:
        super().__init__(0)
        self.choose: Callable[[int], int] = lambda bound: bound - 1

    def below(self, bound: int) -> int:
        return self.choose(bound)


@pytest.fixture
def faults() -> Planned:
    return Planned()


@pytest.fixture
def chooser() -> Scripted:
    return Scripted()


@pytest.fixture
def disk(faults: Planned, chooser: Scripted) -> SimFiles:
    return SimFiles(faults, chooser)
