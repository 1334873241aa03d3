"""Compares what readers get with what they should get, and says who is to blame for an error. Sees actions only.

An end with an error needs an excuse: a fault that struck an operation of this process, of its model, or of the device.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from llm_os.drivers.simulation.host import TamperedImage
from llm_os.drivers.simulation.plan import Plan
from llm_os.drivers.simulation.violation import insist
from llm_os.drivers.simulation.workload import Workload
from llm_os.kernel import events as ev
from llm_os.kernel.driver import RowError
from llm_os.kernel.errors import Closed, Error, Refused, RequestError


class Judge:
    """The readers of all processes, and whoever waits for a ticket."""

    def __init__(self, plan: Plan, workload: Workload) -> None:
        self.ends: Counter[str] = Counter()
        self._plan = plan
        self._workload = workload
        self._tampered: set[str] = set()  # models whose image is a broken plugin's
        self._replied: set[int] = set()
        self._steps = 0
        self.last: object = None  # how the last process ended

    # -- the device ----------------------------------------------------------------------------------------------------

    def run(self, operation: ev.Run) -> None:
        for rows in operation.batch.sequences:
            story = self._workload.stories.get(rows.pid)
            insist(story is not None, "process", f"{rows.pid} runs and was never asked for")
            assert story is not None
            insist(story.request.model == operation.batch.model, "model", f"process {rows.pid} runs on another model")
            story.fed(rows)

    def ran(self, operation: ev.Run, result: Any, fault: str | None) -> None:
        sequences = operation.batch.sequences
        if fault == "wrong_rows":
            self.failed(operation, fault)
            return
        for rows, row in zip(sequences, result, strict=True):
            story = self._workload.stories[rows.pid]
            if isinstance(row, RowError):
                story.excused = story.excused or row.message
            story.ran(rows, row)

    def failed(self, operation: ev.Operation, why: str) -> None:
        """Whom this operation's failure may end."""
        match operation:
            case ev.Run(_, batch):
                struck = [self._workload.stories[rows.pid] for rows in batch.sequences]
            case ev.Encode():
                struck = [s for s in self._workload.live.values() if s.request is operation.request]
            case ev.Open() | ev.Load() | ev.Unload() | ev.Copy():
                struck = [s for s in self._workload.live.values() if s.request.model == operation.model]
            case _:
                struck = []
        for story in struck:
            story.excused = story.excused or why

    def mistold(self, operation: ev.Encode, tokens: Any) -> None:
        """A broken plugin gave these for tokens. If the core takes them, they are the prompt."""
        self.failed(operation, "plugin_type")
        for story in self._workload.live.values():
            if story.request is operation.request and isinstance(tokens, list | tuple | bytes):
                story.prompt, story.context = list(tokens), list(tokens)

    def opened(self, model: str, image: object) -> None:
        if isinstance(image, TamperedImage):
            self._tampered.add(model)
        else:
            self._tampered.discard(model)

    def excuse_all(self, why: str) -> None:
        for story in self._workload.live.values():
            story.excused = story.excused or why

    # -- the readers ---------------------------------------------------------------------------------------------------

    def deliver(self, item: ev.Deliver, now: float) -> None:
        story = self._workload.stories.get(item.pid)
        insist(story is not None, "process", f"{item.pid} answers and was never asked for")
        assert story is not None
        if item.chunk is not None:
            story.read(item.chunk.token_ids, item.chunk.text)
            story.progress = self._steps
        if item.completion is not None:
            story.finish(item.completion, now)
            self.last = item.completion.finish_reason
            self._end(story.pid, item.completion.finish_reason)
        elif item.error is not None:
            insist(story.ended is None, "one end", f"process {item.pid} ends twice")
            story.ended = type(item.error).__name__
            self._blame(story.pid, item.error)
            self.last = item.error
            self._end(story.pid, f"error {type(item.error).__name__}" if story.ended != "Refused" else "rejected")
        else:
            insist(item.chunk is not None and item.chunk.finish_reason is None, "chunk", item)

    def reply(self, item: ev.Reply) -> None:
        insist(item.ticket not in self._replied, "reply", f"ticket {item.ticket} is answered twice")
        self._replied.add(item.ticket)

    def _end(self, pid: int, reason: str) -> None:
        del self._workload.live[pid]
        self.ends[reason] += 1

    def _blame(self, pid: int, error: Exception) -> None:
        story = self._workload.stories[pid]
        insist(isinstance(error, Error) and "\n" not in str(error), "error", repr(error))
        if isinstance(error, Refused | Closed) or story.excused or story.request.model in self._tampered:
            return
        forked = story.parent is not None and isinstance(error, RequestError)
        insist(forked, "blame", f"{pid} ended with {error!r} and no fault had struck it")

    # -- the run -------------------------------------------------------------------------------------------------------

    def stepped(self, steps: int, now: float) -> None:
        self._steps = steps
        live = len(self._workload.live)
        insist(live <= self._plan.config.queue_limit, "queue", f"{live} processes live")

    def crashed(self) -> None:
        for story in list(self._workload.live.values()):
            story.ended = "crash"
            self._end(story.pid, "crash")
        self._tampered.clear()

    def closed(self) -> None:
        return
