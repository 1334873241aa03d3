"""When somebody's time is up: a heap of times and pids. Knows no processes."""

from __future__ import annotations

from collections.abc import Container, Iterator
from heapq import heappop, heappush


class Deadlines:
    """Times at which processes have to be looked at. Entries of those that have ended are dropped when they come up."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []

    def add(self, time: float, pid: int) -> None:
        heappush(self._heap, (time, pid))

    def next(self, live: Container[int]) -> float | None:
        """The earliest time of a live process."""
        while self._heap and self._heap[0][1] not in live:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[int]:
        """Those whose time has come, each once."""
        while self._heap and self._heap[0][0] <= now:
            yield heappop(self._heap)[1]
