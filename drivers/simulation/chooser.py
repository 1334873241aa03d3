"""Every random choice of a simulated run, in one place: a run is the list of its decisions, and the list is the run.

A turn is the list of the choices between two steps of the core. A run that is played again takes them from its script,
turn by turn, so that leaving out one turn does not shift the others; what a script lacks is 0. By convention 0 is the
dullest choice: no fault, no event, the shortest time. Knows nothing of what is decided.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
Script = list[list[int]]


class Chooser:
    """Draws from a seed, or plays a script. `log` is what was chosen."""

    def __init__(self, seed: int, script: Script | None = None) -> None:
        self.log: Script = [[]]
        self._random = random.Random(seed).random  # noqa: S311
        self._script = script
        self._turn = self.log[0]
        self._given = script[0] if script else []

    def turn(self) -> None:
        """The choices from here on belong to the next step."""
        self._turn = []
        self.log.append(self._turn)
        if self._script is not None:
            self._given = self._script[len(self.log) - 1] if len(self.log) <= len(self._script) else []

    def below(self, bound: int) -> int:
        """0 to bound - 1."""
        value = int(self._random() * bound) if self._script is None else self._next(bound)
        self._turn.append(value)
        return value

    def chance(self, probability: float) -> bool:
        value = self._random() < probability if self._script is None else bool(self._next(2))
        self._turn.append(int(value))
        return value

    def which(self, bounds: Sequence[float]) -> int:
        """0 mostly; n + 1 with the probability bounds[n] - bounds[n - 1]. `bounds` grow."""
        value = 0
        if self._script is not None:
            value = self._next(len(bounds) + 1)
        elif (drawn := self._random()) < bounds[-1]:
            value = next(n for n, bound in enumerate(bounds, 1) if drawn < bound)
        self._turn.append(value)
        return value

    def delay(self, longest: int) -> int:
        """Mostly short: 0 to longest, each twice as rare as its half."""
        value = int(longest * self._random() ** 4) if self._script is None else self._next(longest + 1)
        self._turn.append(value)
        return value

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def _next(self, bound: int) -> int:
        at = len(self._turn)
        return min(self._given[at], bound - 1) if at < len(self._given) else 0
