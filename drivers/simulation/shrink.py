"""Makes the script of a failed run shorter and duller while it fails in the same way (delta debugging; Zeller and
Hildebrandt, TSE 2002): whole turns go first, then decisions become 0, then smaller. Bounded in plays and in time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from msgspec import structs

from llm_os.drivers.simulation.chooser import Script
from llm_os.drivers.simulation.play import Failure, play


class _Shrinker:
    def __init__(self, failure: Failure, plays: int, seconds: float) -> None:
        self.best = failure
        self._plays = plays
        self._deadline = time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        return self._plays <= 0 or time.monotonic() > self._deadline

    def fails(self, steps: int, script: Script) -> bool:
        """Whether this one does too; then it is the best."""
        if self.spent:
            return False
        self._plays -= 1
        options = structs.replace(self.best.options, steps=steps)
        failure = play(self.best.seed, options, script).failure
        if failure is None or failure.kind != self.best.kind or _size(failure.script) >= _size(self.best.script):
            return False
        self.best = failure
        return True

    def without(self, start: int, count: int) -> bool:
        """Leave out turns; the first one is the machine and stays."""
        steps, script = self.best.options.steps, self.best.script
        steps -= len(range(start, min(start + count, steps + 1)))
        return self.fails(steps, script[:start] + script[start + count :])

    def emptied(self, start: int, count: int) -> bool:
        """Nothing is decided in these turns."""
        script = self.best.script
        if not any(any(turn) for turn in script[start : start + count]):
            return False
        dull: Script = [[] for _ in script[start : start + count]]
        return self.fails(self.best.options.steps, script[:start] + dull + script[start + count :])

    def chunks(self, change: Callable[[int, int], bool]) -> None:
        """Try `change` on ever smaller runs of turns, from the end, where it matters least to what comes after."""
        count = len(self.best.script) // 2
        while count and not self.spent:
            start = len(self.best.script) - count
            while start >= 1 and not self.spent:
                change(start, count)
                start = min(start, len(self.best.script)) - count
            count //= 2

    def lower(self) -> None:
        """Each decision by itself, as low as it goes."""
        for turn, at in _places(self.best.script):
            for divisor in (0, 8, 2):
                script = self.best.script
                if turn >= len(script) or at >= len(script[turn]) or script[turn][at] == 0:
                    break
                less = script[turn][at] // divisor if divisor else 0
                changed = [*script[turn][:at], less, *script[turn][at + 1 :]]
                if self.fails(self.best.options.steps, [*script[:turn], changed, *script[turn + 1 :]]):
                    break


def shrink(failure: Failure, plays: int = 2000, seconds: float = 20.0) -> Failure:
    """The shortest run found that breaks the same promise, with its story."""
    shrinker = _Shrinker(failure, plays, seconds)
    shrinker.fails(min(failure.step, failure.options.steps), failure.script)
    before = None
    while before is not shrinker.best and not shrinker.spent:
        before = shrinker.best
        shrinker.chunks(shrinker.without)
        shrinker.chunks(shrinker.emptied)
        shrinker.lower()
    told = play(failure.seed, shrinker.best.options, shrinker.best.script, tell=True).failure
    assert told is not None
    return told


def _size(script: Script) -> tuple[int, int, int]:
    """What is to become less: turns, decisions other than 0, their sum."""
    values = [value for turn in script for value in turn if value]
    return len(script), len(values), sum(values)


def _places(script: Script) -> Iterator[tuple[int, int]]:
    return ((turn, at) for turn in reversed(range(len(script))) for at in range(len(script[turn])))
