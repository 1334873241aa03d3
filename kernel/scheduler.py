"""Who runs next, and with how many tokens. Decides only; knows neither drivers nor the outside.

Continuous batching (Orca, Yu et al., OSDI 2022) with chunked prefill (Sarathi-Serve, Agrawal et al., OSDI 2024): each
turn hands out `batch_tokens` tokens to at most `batch_size` processes of one model. A process that is one token behind
its text decodes; one that is more behind prefills; nothing else tells the two apart.

Order: class (nice), then decoding before prefilling, then arrival. When pages run out, the process with the highest
(nice, pid) that comes after the one in need loses its pages and recomputes them later (vLLM, Kwon et al., SOSP 2023).
Nobody takes pages from a process that is in this turn's batch already; when nobody is, the lowest (nice, pid) can take
from all others. So somebody gets on every turn, and the lowest at the latest when those before it in the batch end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llm_os.kernel.driver import Move
from llm_os.kernel.process import Process, State
from llm_os.kernel.residency import Model


class Turn:
    """What one call of `Scheduler.plan` decided. `starved` is a process that can never get the pages it needs."""

    def __init__(self) -> None:
        self.batch: list[tuple[Process, int]] = []  # with how many tokens each
        self.copies: list[tuple[Process, Move]] = []  # to be performed before their process can run
        self.starved: Process | None = None


class Scheduler:
    """Plans one forward pass at a time."""

    def __init__(self, batch_tokens: int, batch_size: int) -> None:
        self.batch_tokens = batch_tokens
        self.batch_size = batch_size

    def ranked(self, models: Iterable[Model], processes: Iterable[Process]) -> list[Model]:
        """Models with work, the one to run first: by the most urgent class; models of one class take turns."""
        urgency: dict[str, int] = {}
        for process in processes:
            if process.state is State.READY:
                name = process.request.model
                urgency[name] = min(process.nice, urgency.get(name, process.nice))
        ready = [model for model in models if model.name in urgency]
        return sorted(ready, key=lambda model: (urgency[model.name], model.last_run))

    def plan(self, model: Model, processes: Sequence[Process]) -> Turn:
        """Fill a batch of `model`. Allocates pages, and takes them from processes that come later in order."""
        turn = Turn()
        budget = self.batch_tokens
        ready = [p for p in processes if p.state is State.READY and p.request.model == model.name]
        for process in sorted(ready, key=lambda p: (p.nice, p.remaining > 1, p.pid)):
            if budget == 0 or len(turn.batch) == self.batch_size:
                break
            planned = {chosen.pid for chosen, _ in (*turn.batch, *turn.copies)}
            count = self._make_room(process, min(process.remaining, budget), processes, planned)
            if count == 0:
                if not turn.batch and not turn.copies and not _others_hold_pages(process, processes):
                    turn.starved = process
                    break
                continue
            assert process.table is not None
            move = process.table.prepare(process.computed, process.computed + count)
            if move is None:
                turn.batch.append((process, count))
                budget -= count
            else:
                turn.copies.append((process, move))
        return turn

    def _make_room(self, process: Process, count: int, processes: Sequence[Process], planned: set[int]) -> int:
        """Preempt until the next `count` tokens have pages; how many of them do."""
        table = process.table
        assert table is not None
        while table.shortage(process.computed, process.computed + count) > table.slab.available:
            victims = [
                other
                for other in processes
                if other.state is State.READY
                and other.table
                and other.table.pages
                and other.pid not in planned
                and (other.nice, other.pid) > (process.nice, process.pid)
            ]
            if not victims:
                return _what_fits(process, count)
            preempt(max(victims, key=lambda other: (other.nice, other.pid)))
        return count


def preempt(process: Process) -> None:
    """Take its pages; its tokens stay, and it will compute their KV again."""
    assert process.table is not None
    process.table.release()
    process.computed = 0


def _what_fits(process: Process, count: int) -> int:
    table = process.table
    assert table is not None
    while count and table.shortage(process.computed, process.computed + count) > table.slab.available:
        count -= 1
    return count


def _others_hold_pages(process: Process, processes: Iterable[Process]) -> bool:
    return any(other is not process and other.table and other.table.pages for other in processes)
