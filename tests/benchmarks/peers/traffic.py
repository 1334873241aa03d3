"""A mixed load, played to an engine that works step by step. Standard library only: runs in the workers.

A wish is [seconds after the start, prompt, tokens to answer, index of its shared prefix, tokens of that prefix].
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

Wish = Sequence[Any]


def allowed_late(count: int) -> int:
    """How many of `count` answers may come late while the 95th percentile (nearest rank) still is in time."""
    return count - math.ceil(0.95 * count)


class Watch:
    """Latencies of the wishes, each from its arrival to its last token, and whether the bound is lost already."""

    def __init__(self, wishes: Sequence[Wish], bound: float) -> None:
        self.wishes, self.bound = wishes, bound
        self.latencies: dict[int, float] = {}
        self.tokens = 0
        self.began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.began

    def done(self, index: int, tokens: int) -> None:
        self.latencies[index] = self.now() - self.wishes[index][0]
        self.tokens += tokens

    def lost(self) -> bool:
        """Too many are late, those included that are not answered yet."""
        now = self.now()
        ages = (self.latencies.get(index, now - wish[0]) for index, wish in enumerate(self.wishes))
        late = sum(1 for age in ages if age > self.bound)
        return late > allowed_late(len(self.wishes))

    def played(self) -> dict[str, Any]:
        """latencies in seconds, of those that were answered; tokens answered; seconds from the first arrival."""
        seconds = self.now() - (self.wishes[0][0] if self.wishes else 0)
        whole = len(self.latencies) == len(self.wishes)
        return {"latencies": list(self.latencies.values()), "tokens": self.tokens, "seconds": seconds, "whole": whole}


def play(
    wishes: Sequence[Wish],
    bound: float,
    admit: Callable[[int, Wish], None],
    step: Callable[[Callable[[int, int], None]], bool],
) -> dict[str, Any]:
    """`admit` takes a wish; `step` works a little, tells which wish is done with how many tokens, and is False when
    there was nothing to do. Ends early when the bound is lost."""
    watch, next_wish, busy = Watch(wishes, bound), 0, False
    while len(watch.latencies) < len(wishes) and not watch.lost():
        while next_wish < len(wishes) and wishes[next_wish][0] <= watch.now():
            admit(next_wish, wishes[next_wish])
            next_wish, busy = next_wish + 1, True
        if busy:
            busy = step(watch.done)
        else:
            time.sleep(max(0.0, wishes[next_wish][0] - watch.now()))
    return watch.played()
