"""Work without progress: an operation that fails and is begun again at once, loads or batches that lead to no token.

Bounds, between two events that get somebody on (a token, an end, a token of a prompt that had not been fed before, or
something asked from outside):

    HOT     failures of one kind of operation on one model, with no operation that succeeds between them
    LOADS   loads that succeed, without a batch: each model may come once for each process that waits for it
    AGAIN   times the tokens of all live processes, fed again after a preemption
"""

from __future__ import annotations

from collections.abc import Iterable

from llm_os.drivers.simulation.story import Story
from llm_os.drivers.simulation.violation import insist
from llm_os.kernel import events as ev
from llm_os.kernel.driver import Sequence as Rows

HOT = 20
LOADS = 50
AGAIN = 4


class Pace:
    """Of one life."""

    def __init__(self) -> None:
        self._failures = 0
        self._failing: tuple[str, str] | None = None
        self._loads = 0
        self._again = 0
        self._fed: dict[int, int] = {}  # how far a process has been fed

    def progress(self) -> None:
        self._loads = self._again = 0

    def asked(self) -> None:
        """Something came from outside, or somebody ended."""
        self._failures = 0
        self.progress()

    def failed(self, operation: ev.Operation) -> None:
        kind = type(operation).__name__, getattr(operation, "model", "")
        self._failures = self._failures + 1 if kind == self._failing else 1
        self._failing = kind
        insist(self._failures <= HOT, "hot loop", f"{kind[0]} of {kind[1]} has failed {self._failures} times in a row")

    def succeeded(self, operation: ev.Operation) -> None:
        self._failures = 0
        if isinstance(operation, ev.Load):
            self._loads += 1
            insist(self._loads <= LOADS, "thrash", f"{self._loads} loads, and nobody has got on")

    def fed(self, rows: Rows, live: Iterable[Story]) -> None:
        end, known = rows.position + len(rows.tokens), self._fed.get(rows.pid, 0)
        self._again += max(0, min(end, known) - rows.position)
        if end > known:
            self._fed[rows.pid] = end
            self.progress()
        elif self._again > 100:
            bound = AGAIN * sum(len(story.context) for story in live)
            insist(self._again <= bound, "livelock", f"{self._again} tokens were fed again, and nobody has got on")
