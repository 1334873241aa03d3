"""Who runs next, and with how many tokens. Decides only; knows neither drivers nor the outside.

    waiting ──admit──> active ──plan──> batch            active: the running set, at most `batch_size` of a model
       ^                 │
       └───suspend───────┘  keeps its pages until somebody needs them

Continuous batching (Orca, Yu et al., OSDI 2022) with chunked prefill (Sarathi-Serve, Agrawal et al., OSDI 2024): each
turn hands out `batch_tokens` tokens to active processes of one model, those that decode first.

Who is admitted next: the most urgent class, then what the policy says (`policy.py`; by default the tenant that had the
least, `accounting.py`), then who has waited longest. One order for all models on the device, and nobody passes the
first in it, so that many small requests cannot keep a large one out. A newcomer whose nice is better than an active
process's class suspends it; else who is active goes on until it ends, or its pages are taken.

A class is a nice and all who wait with it. It becomes better by one for each `aging_s` that the one who waits longest
has waited in all, at most as good as the best nice that is here: so waiting brings nobody before another of the same
nice (that would make first come, first served of fair share), and after 39 * aging_s the worst class shares with the
best. What a process has gained by then it keeps while it is active: waiting protects, but does not push. It ages on
while it is active and gets into no batch.

When pages run out, they are taken in this order: cached ones; of processes that are blocked, by what their waiting
wastes (InferCept, Abhyankar et al., ICML 2024); of others that are not active; idle models' weights; of active
processes that come later in (class, seniority) than the one in need. Who can take from nobody is suspended, and then
others may take from it: so somebody gets on every turn.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from llm_os.kernel.accounting import Accounting
from llm_os.kernel.config import Config
from llm_os.kernel.pager import Pager
from llm_os.kernel.policy import Candidate, Policy
from llm_os.kernel.process import Process, State
from llm_os.kernel.residency import Model

# class, share of the tenant, rank of the process, since when it waits, pid: the least is first
Order = tuple[int, float, float, float, int]
Planned = Sequence[tuple[Process, int]]  # a batch: processes, each with how many tokens

_LAST = 1 << 60


class Scheduler:
    """The run queue of one device."""

    def __init__(
        self, config: Config, pager: Pager, accounting: Accounting, policy: Policy, spare: Callable[[Model], bool]
    ) -> None:
        """`spare(model)` starts to evict the weights of an idle model other than this one; False if there is none."""
        self._batch_tokens = config.batch_tokens
        self._batch_size = config.batch_size
        self._aging_s = config.aging_s
        self._pager = pager
        self._accounting = accounting
        self._policy = policy
        self._by_arrival = True  # no process has been ranked by anything else
        self._spare = spare
        self._active: dict[str, dict[int, Process]] = {}  # by model
        self._queues: dict[str, dict[int, dict[str, deque[Process]]]] = {}  # by model, nice and tenant
        self._nices: Counter[int] = Counter()  # of all who wait or are active
        self.idle: dict[int, Process] = {}  # processes that have pages and are not active
        self._seniority = 0

    # -- the two sets ------------------------------------------------------------------------------------------------

    def enqueue(self, process: Process, now: float) -> None:
        """It comes from outside, and waits to become active."""
        self._accounting.arrived(process.request.tenant, process.nice)
        self._nices[process.nice] += 1
        self._queue(process, now)

    def _queue(self, process: Process, now: float) -> None:
        """Among those of its nice and tenant behind all of a lower rank, and of its own who have waited longer."""
        process.queued, process.rank = now, self._policy.rank(_candidate(process))
        self._by_arrival &= process.rank == 0.0
        self._accounting.waits(process.request.tenant, 1)
        queues = self._queues.setdefault(process.request.model, {}).setdefault(process.nice, {})
        queue = queues.setdefault(process.request.tenant, deque())
        at, place = len(queue), (process.rank, now - process.waited)
        while at and (queue[at - 1].rank, queue[at - 1].queued - queue[at - 1].waited) > place:
            at -= 1
        queue.insert(at, process)
        self.note_pages(process)

    def withdraw(self, process: Process) -> None:
        """It neither runs nor waits from now on: it has ended, or is blocked."""
        if self._active.get(process.request.model, {}).pop(process.pid, None) or self._unqueue(process):
            self._nices[process.nice] -= 1
        process.active = False
        self.note_pages(process)

    def suspend(self, process: Process, now: float) -> None:
        """From the running set back to the queue, with its pages."""
        del self._active[process.request.model][process.pid]
        process.active = False
        self._queue(process, now if process.ran else process.queued)

    def runs(self, process: Process, now: float) -> None:
        """It is in a batch: it does not wait any more."""
        process.urgency, process.ran_at = self.urgency(process, now), now
        if not process.ran:
            process.ran = True
            process.waited += now - process.queued

    def renice(self, process: Process, nice: int) -> None:
        waiting = self._unqueue(process)
        if waiting or process.active:
            self._nices[process.nice] -= 1
            self._nices[nice] += 1
        process.nice = process.urgency = nice
        if waiting:
            self._queue(process, process.queued)

    def _unqueue(self, process: Process) -> bool:
        model = self._queues.get(process.request.model, {})
        queues = model.get(process.nice, {})
        queue = queues.get(process.request.tenant, ())
        if process not in queue:
            return False
        assert isinstance(queue, deque)
        queue.remove(process)
        self._accounting.waits(process.request.tenant, -1)
        if not queue:
            del queues[process.request.tenant]
        if not queues:
            del model[process.nice]
        if not model:
            del self._queues[process.request.model]
        return True

    def note_pages(self, process: Process) -> None:
        """Its pages or its state have changed: is it one that has pages without being active?"""
        if process.state is not State.ENDED and not process.active and process.table and process.table.pages:
            self.idle[process.pid] = process
        else:
            self.idle.pop(process.pid, None)

    @property
    def running(self) -> bool:
        """Whether anybody is active."""
        return any(self._active.values())

    def active(self, model: str) -> list[Process]:
        return list(self._active.get(model, {}).values())

    # -- who is first ------------------------------------------------------------------------------------------------

    def urgency(self, process: Process, now: float) -> int:
        """The class of a process now."""
        if process.active and process.ran:
            waited = now - process.ran_at
            return process.urgency if waited < self._aging_s else self._aged(process.urgency, waited)
        if process.active:  # it still waits for its first batch: for its pages to come back, say
            return min(process.urgency, self._aged(process.nice, process.waited + now - process.queued))
        return self._class(process.nice, now)

    def _rank(self, process: Process, now: float) -> tuple[int, int]:
        """Of active processes: the greatest loses its pages first."""
        return self.urgency(process, now), process.seniority

    def _class(self, nice: int, now: float) -> int:
        queues = (q for model in self._queues.values() if nice in model for q in model[nice].values())
        longest = (p for q in queues for p in ((q[0],) if self._by_arrival else q))
        return self._aged(nice, max((p.waited + now - p.queued for p in longest), default=0.0))

    def _aged(self, urgency: int, waited: float) -> int:
        gained = int(waited / self._aging_s)
        if gained <= 0:
            return urgency
        best = min(nice for nice, count in self._nices.items() if count)
        return min(urgency, max(best, urgency - gained))

    def first(self, model: str, now: float) -> tuple[Order, Process] | None:
        """Who of this model's waiting processes is to become active next, and its place in the order."""
        share = self._accounting.share
        found = None
        for nice, queues in self._queues.get(model, {}).items():
            urgency = self._class(nice, now)
            for tenant, queue in queues.items():
                head = queue[0]
                order = urgency, share(tenant), head.rank, head.queued - head.waited, head.pid
                if found is None or order < found[0]:
                    found = order, head
        return found

    def standing(self, model: str, now: float) -> tuple[int, float] | None:
        """The best class of all who run or wait with this model, and the least share in it; None if nobody does."""
        share = self._accounting.share
        active = self._active.get(model, {}).values()
        standings = [(self.urgency(process, now), share(process.request.tenant)) for process in active]
        if (first := self.first(model, now)) is not None:
            standings.append(first[0][:2])
        return min(standings, default=None)

    # -- a turn ------------------------------------------------------------------------------------------------------

    def ranked(self, models: Iterable[Model], now: float) -> list[Model]:
        """Those with a process that could run, the one to run first: by class, then by whose tenant had the least, then
        in turns."""
        ready = [(m, [p for p in self._active.get(m.name, {}).values() if not p.flights]) for m in models]
        ready = [(model, processes) for model, processes in ready if processes]
        if len(ready) < 2:
            return [model for model, _ in ready]
        share = self._accounting.share
        keyed = [
            (*min((self.urgency(p, now), share(p.request.tenant)) for p in processes), model.last_run, model)
            for model, processes in ready
        ]
        return [model for *_, model in sorted(keyed, key=lambda entry: entry[:3])]

    def admit(self, models: Iterable[Model], now: float, before: Order | None) -> Process | None:
        """Let waiting processes of these models become active while there is room; nobody who comes after `before`.
        Returns the one for whom there was no room."""
        open_models = {model.name: model for model in models}
        while open_models:
            candidates = [(first, name) for name in open_models if (first := self.first(name, now)) is not None]
            if not candidates:
                return None
            (order, process), name = min(candidates, key=lambda candidate: candidate[0][0])
            if before is not None and order > before:
                return None
            active = self._active.setdefault(name, {})
            if len(active) >= self._batch_size:
                last = self._last(active.values(), process.nice, now)
                if last is None or last.flights:
                    del open_models[name]
                    continue
                self.suspend(last, now)
            if not self._activate(process, open_models[name], order[0], now):
                return process
        return None

    def _last(self, active: Iterable[Process], nice: int, now: float) -> Process | None:
        """The last of the active processes, if its class is later than `nice`."""
        if max(other for other, count in self._nices.items() if count) <= nice:  # no class is later than its nice
            return None
        last = max(active, key=lambda process: self._rank(process, now))
        return last if self.urgency(last, now) > nice else None

    def _activate(self, process: Process, model: Model, urgency: int, now: float) -> bool:
        """Give it pages for all its tokens, or bring them back. False if there is no room yet."""
        table = process.table
        assert table is not None
        if process.flights or any(page.busy and page.slot is not None for page in table.pages):
            return False  # its pages are on their way out or in, or moving
        self._pager.attach(process)
        process.paid = max(process.paid, process.computed)
        seniority = process.seniority or _LAST
        needed = table.shortage(process.computed, len(process.tokens)) + len(table.swapped)
        if not self._secure(process, model, needed, (process.nice, seniority), now):
            self.note_pages(process)
            return False
        if table.swapped:
            if not self._pager.swapper.back(process):
                return False
            self._pager.add_pages(process, len(process.tokens))
        else:
            self._pager.grow(process, len(process.tokens))  # nobody who is admitted later can take this room
        self._unqueue(process)
        self.idle.pop(process.pid, None)
        if not process.seniority:
            self._seniority += 1
            process.seniority = self._seniority
        process.active, process.urgency, process.ran = True, urgency, False
        unpaid = process.foreign(process.paid, len(process.tokens))
        self._accounting.admitted(process.request.tenant, process.nice, unpaid)
        process.paid = len(process.tokens)
        self._active[process.request.model][process.pid] = process
        return True

    def plan(self, model: Model, now: float) -> tuple[list[tuple[Process, int]], Process | None]:
        """A batch of `model`: processes, each with how many tokens. Allocates pages for them, taking them from others
        if it must. With it, the process that could not get a page although nobody else has any: it starves."""
        batch: list[tuple[Process, int]] = []
        budget = self._batch_tokens
        ready = [p for p in self._active.get(model.name, {}).values() if not p.flights]
        ready.sort(key=lambda p: (self.urgency(p, now), p.remaining > 1, p.seniority))
        for process in ready:
            if budget == 0 or len(batch) == self._batch_size:
                break
            if not process.active:  # suspended by one before it
                continue
            table = process.table
            assert table is not None
            count = min(process.remaining, budget)
            needed = table.shortage(process.computed, process.computed + count)
            rank = process.nice, process.seniority
            if needed and not self._secure(process, model, needed, rank, now, batch):
                if self._pager.freeing or self._spare(model):
                    continue
                if not batch and self._alone(process):
                    return batch, process
                self.suspend(process, now)
                continue
            if needed and self._pager.grow(process, process.computed + count):
                continue
            batch.append((process, count))
            budget -= count
        return batch, None

    def _secure(
        self, process: Process, model: Model, needed: int, rank: tuple[int, int], now: float, batch: Planned = ()
    ) -> bool:
        """Take pages from others, but those in `batch`, until so many can be placed. False if there are none to be had,
        or none yet."""
        assert process.table is not None
        slab = process.table.slab
        while not self._pager.room_for(slab, needed):
            if self._pager.freeing:
                return False
            victim = next(self._victims(process, model, rank, now, batch), None)
            if victim is None:
                return False
            if victim.active:
                self.suspend(victim, now)
            self._pager.take(victim)
            self.note_pages(victim)
        return True

    def _victims(
        self, process: Process, model: Model, rank: tuple[int, int], now: float, batch: Planned
    ) -> Iterator[Process]:
        """Whose pages go first."""
        idle = self.last_idle(process, now)
        if idle is not None:
            yield idle
            return
        if self._spare(model):
            return
        spared = {p.pid for p, _ in batch}
        later = [
            p
            for active in self._active.values()
            for p in active.values()
            if self._rank(p, now) > rank
            and p is not process
            and not p.flights
            and p.pid not in spared
            and p.table
            and p.table.pages
            and (p.ran or self.urgency(p, now) > rank[0])  # what is brought back is used before it goes again
        ]
        if later:
            yield max(later, key=lambda p: self._rank(p, now))

    def last_idle(self, but: Process | None = None, now: float = 0.0) -> Process | None:
        """Whose device pages go first of those who are not active."""
        idle = [p for p in self.idle.values() if p is not but and not p.flights and _on_device(p)]
        blocked = [p for p in idle if p.state is State.BLOCKED]
        if blocked:
            return max(blocked, key=lambda p: (_waste(p, now), p.pid))
        return max(idle, key=lambda p: (p.urgency, p.seniority, p.pid), default=None)

    def last_active(self, urgency: int, now: float) -> Process | None:
        """Suspend the last of the active processes of a later class that have pages; None if there is none."""
        later = [
            p
            for active in self._active.values()
            for p in active.values()
            if self.urgency(p, now) > urgency and not p.flights and _on_device(p)
        ]
        last = max(later, key=lambda p: self._rank(p, now), default=None)
        if last is not None:
            self.suspend(last, now)
        return last

    def _alone(self, process: Process) -> bool:
        """Whether no other process has pages on the device."""
        others = (p for active in self._active.values() for p in active.values() if p is not process)
        return not any(_on_device(p) for p in (*others, *self.idle.values()) if p is not process)


def _candidate(process: Process) -> Candidate:
    limit = process.request.deadline_s
    return Candidate(
        pid=process.pid,
        tenant=process.request.tenant,
        model=process.request.model,
        nice=process.nice,
        prompt_tokens=process.prompt_tokens,
        max_tokens=process.max_tokens,
        submitted=process.submitted,
        deadline=None if limit is None else process.submitted + limit,
    )


def _on_device(process: Process) -> bool:
    return process.table is not None and any(page.number is not None for page in process.table.pages)


def _waste(process: Process, now: float) -> float:
    """What it wastes to keep the pages of a blocked process: bytes times the seconds that it will still wait."""
    assert process.table is not None
    wait = 10.0 if process.resumes is None else max(0.0, process.resumes - now)
    return len(process.table.pages) * process.table.slab.page_bytes * wait
