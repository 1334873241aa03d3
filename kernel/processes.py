"""The process table: how processes come, change and end, and what their streams are told. Knows no weights, no frames.

    submit ──> NEW ──encode──> READY ──> … ──> ended, told once, pages back as soon as nothing in flight names them
    fork, restore ───────────────^

How those begin that continue another one is in `forks.py`, and those of an earlier life in `sessions.py`; how they
stop for a while in `pauses.py`.
"""

from __future__ import annotations

from functools import partial

from llm_os.kernel import events as ev
from llm_os.kernel.accounting import Accounting
from llm_os.kernel.compiling import Compiling
from llm_os.kernel.config import Config
from llm_os.kernel.constraint import obeyed
from llm_os.kernel.deadlines import Deadlines
from llm_os.kernel.drafting import Drafting
from llm_os.kernel.driver import Batch, Row, RowError, Sampled
from llm_os.kernel.driver import Sequence as Rows
from llm_os.kernel.errors import Closed, DriverError, Error, ModelError, Refused, RequestError, as_error
from llm_os.kernel.flights import Flights
from llm_os.kernel.forks import Forks
from llm_os.kernel.journal import Began, Done, Record, Reniced, Took
from llm_os.kernel.outbox import Outbox
from llm_os.kernel.page_table import PageTable
from llm_os.kernel.pager import Pager
from llm_os.kernel.pauses import Pauses
from llm_os.kernel.process import Process, ProcessInfo, State, joined
from llm_os.kernel.request import Chunk, FinishReason
from llm_os.kernel.residency import Model, Residency, Where
from llm_os.kernel.scheduler import Scheduler
from llm_os.kernel.sessions import Sessions


class Processes:
    """Every process that has not ended, and those that have but are still named by an operation in flight."""

    def __init__(
        self,
        config: Config,
        flights: Flights,
        outbox: Outbox,
        pager: Pager,
        residency: Residency,
        scheduler: Scheduler,
        accounting: Accounting,
        drafting: Drafting,
    ) -> None:
        self.live: dict[int, Process] = {}  # in order of arrival
        self.zombies: dict[int, Process] = {}
        self.halting = False
        self.forks = Forks(self, flights, outbox)
        self.sessions = Sessions(self, flights, outbox)
        self.pauses = Pauses(self, flights, outbox, residency, scheduler)
        self.compiling = Compiling(self, flights)
        self._queue_limit = config.queue_limit
        self._queue_s = config.queue_s
        self._flights = flights
        self._outbox = outbox
        self._pager = pager
        self._residency = residency
        self._scheduler = scheduler
        self._accounting = accounting
        self._drafting = drafting
        self._last_pid = 0
        self._deadlines = Deadlines()
        self._last_end: float | None = None
        self._between_ends = 1.0  # seconds, moving average: what a refused caller is told to wait

    @property
    def next_deadline(self) -> float | None:
        return self._deadlines.next(self.live)

    def of(self, model: Model) -> list[Process]:
        return [process for process in self.live.values() if process.request.model == model.name]

    # -- beginnings --------------------------------------------------------------------------------------------------

    def submit(self, event: ev.Submit) -> None:
        if not self.is_new(event.pid):
            return
        request = event.request
        seed = event.seed if request.sampling.seed is None else request.sampling.seed
        process = Process(event.pid, request, seed, self._flights.now, nice=request.nice)
        if self.enter(process):
            self.begin(process)

    def is_new(self, pid: int) -> bool:
        """Pids only grow: no other has been used."""
        new, self._last_pid = pid > self._last_pid, max(self._last_pid, pid)
        return new

    def enter(self, process: Process) -> bool:
        """Into the table, if there is room for it."""
        try:
            if self.halting:
                raise Closed("the kernel is closed")
            if len(self.live) >= self._queue_limit and not process.restored:
                wait = self._between_ends
                raise Refused(
                    f"{len(self.live)} processes are live, the most that queue_limit allows; try again in {wait:.2g} s",
                    wait,
                )
            process.reservation = self._accounting.enter(process.request.tenant, process.restored)
        except Error as refusal:
            self._flights.emit(ev.Deliver(process.pid, error=refusal))
            return False
        self.live[process.pid] = process
        self._residency.open(process.request.model).live += 1
        request = process.request
        queue_s = self._queue_s if request.queue_s is None else request.queue_s
        for limit in (None if process.restored else queue_s, request.deadline_s):
            if limit is not None:
                self._deadlines.add(process.submitted + limit, process.pid)
        return True

    def begin(self, process: Process) -> None:
        model = self._residency.models[process.request.model]
        if model.where is not Where.OPENING and not model.leaving:
            self._encode(process, model)

    def opened(self, model: Model) -> None:
        """The image is there: go on with who waits for it."""
        for process in self.of(model):
            if process.image is None and process.parent is None:  # a child waits for its parent
                self._encode(process, model)

    def _encode(self, process: Process, model: Model) -> None:
        assert model.image is not None
        process.image = model.image
        if not self.sessions.begin(process):
            self._flights.start(
                ev.Encode(self._flights.next_id(), model.image, process.request, process.pid), (process,)
            )

    def encoded(self, process: Process, event: ev.Completed) -> None:
        if process.state is State.ENDED:
            return
        tokens = event.result
        error = event.error
        if error is None and not isinstance(tokens, list):
            error = RequestError(f"the tokenizer gave {type(tokens).__name__}, no list of token ids")
        if error is not None:
            self.fail(process, as_error(error, RequestError))
        else:
            self.compiling.ensure(process, partial(self._admit, process, tokens))

    def _admit(self, process: Process, tokens: list[int]) -> None:
        try:
            process.admit(tokens)
            self.reserve(process)
        except Exception as failure:  # the image is a plugin's code
            self.fail(process, as_error(failure, RequestError))
            return
        self.note_beginning(process)
        self.ready(process)

    def note_beginning(self, process: Process) -> None:
        """From now on another life may go on with it."""
        prompt = tuple(process.tokens[: process.prompt_tokens])
        self._outbox.note(Began(process.pid, process.request, process.seed, prompt))
        if process.nice != process.request.nice:
            self._outbox.note(Reniced(process.pid, process.nice))

    def reserve(self, process: Process) -> None:
        """Set aside what it may use. Raises Refused for what could never be had, or not now."""
        model = self._residency.models[process.request.model]
        assert model.slab is not None and process.reservation is not None
        answer = process.request.sampling.max_tokens
        self._residency.check_size(model)
        self._residency.check_room(model, process.prompt_tokens, answer or 1)
        said = len(process.generated)
        left = None if answer is None else answer - said
        most = self._accounting.reserve(process.reservation, len(process.tokens), left, model.slab.page_tokens)
        if most is not None:
            process.max_tokens = min(process.max_tokens, said + most)

    def extend(self, process: Process, given: int, ahead: int = 0) -> None:
        """Set aside what it may use beyond its request: `given` tokens, of which `ahead` are not in its context yet.
        Raises Refused."""
        slab = self._residency.models[process.request.model].slab
        assert slab is not None and process.reservation is not None
        total = len(process.tokens) + ahead + process.max_tokens - len(process.generated)
        self._accounting.extend(process.reservation, given, total, slab.page_tokens)

    def ready(self, process: Process) -> None:
        """It has tokens: from now on it waits for its turn."""
        model = self._residency.models[process.request.model]
        assert model.slab is not None
        process.state = State.READY
        if process.table is None:
            process.table = PageTable(model.slab)
        if model.where is not Where.ON_DEVICE:
            process.faulted = self._flights.now
        self._residency.touch(model)
        self._scheduler.enqueue(process, self._flights.now)
        self.forks.begin(process)
        if process.holding:  # a fork, or of an earlier life
            self._say(process, Chunk(text="", waiting=True))
            self.pauses.hold(process)
        self.pauses.stop_if_asked(process)

    # -- changes -----------------------------------------------------------------------------------------------------

    def kill(self, event: ev.Kill) -> None:
        if process := self.live.get(event.pid):
            if event.keep:
                self.fail(process, Closed("its reader cannot be told"), keep=True)
            else:
                self.end(process, "cancelled")
        elif event.ticket is None and not event.keep and not self.halting:
            # it had ended, and its reader has gone without reading that
            self._outbox.note(Done(event.pid))
        if event.ticket is not None:
            self._reply(event.ticket)

    def renice(self, event: ev.Renice) -> None:
        process = self.live.get(event.pid)
        if process is not None:
            self._scheduler.renice(process, event.nice)
            if process.tokens or process.restored:
                self._outbox.note(Reniced(process.pid, process.nice))
        self._reply(event.ticket, None if process else RequestError(f"there is no process {event.pid}"))

    def expire(self, now: float) -> None:
        """End those whose time is up."""
        for pid in self._deadlines.due(now):
            process = self.live.get(pid)
            if process is None:
                continue
            request = process.request
            queue_s = self._queue_s if request.queue_s is None else request.queue_s
            if request.deadline_s is not None and now >= process.submitted + request.deadline_s:
                self.end(process, "deadline")
            elif process.restored or queue_s is None or process.admitted is not None:
                continue
            elif now >= process.submitted + queue_s:
                waited = f"it waited {now - process.submitted:.3g} s and has not run; queue_s allows {queue_s:g} s"
                self.fail(process, Refused(f"{waited}; try again later", self._between_ends))

    # -- a batch has run ---------------------------------------------------------------------------------------------

    def ran(self, batch: Batch, processes: tuple[Process, ...], event: ev.Completed, seconds: float) -> None:
        rows, error = event.result, event.error
        if error is None and (not isinstance(rows, tuple) or len(rows) != len(processes)):
            count = len(rows) if isinstance(rows, tuple) else f"{type(rows).__name__}, not"
            error = DriverError(f"the driver answered {count} rows to a batch of {len(processes)}")
        if error is None:
            fed_tokens = sum(fed.end - fed.position for fed in batch.sequences)
            sampled = any(fed.sample is not None for fed in batch.sequences)
            self._residency.computed(batch.model, fed_tokens, sampled, seconds)
            self._drafting.measured(batch, seconds)
        for index, (process, fed) in enumerate(zip(processes, batch.sequences, strict=True)):
            if process.state is State.ENDED:
                continue
            process.state = State.READY
            if error is not None:
                self.fail(process, as_error(error, DriverError))
            else:
                self._advance(process, fed, obeyed(fed.sample, rows[index]))

    def _advance(self, process: Process, fed: Rows, row: Row) -> None:
        """Its KV has grown, and there may be one more token of the answer, or some, or the end of it."""
        sampled = fed.sample is not None
        if isinstance(row, RowError) and row.cause is not None:
            self.fail(process, row.cause)
            return
        if (sampled and not isinstance(row, Sampled)) or isinstance(row, RowError):
            self._pager.distrust(process)
            message = row.message if isinstance(row, RowError) else "the driver gave no token for a row"
            self.fail(process, DriverError(message))
            return
        process.computed += len(fed.tokens)
        process.charged = max(process.charged, process.computed)
        chunks: list[Chunk] = []
        failure = None
        found = self._drafting.chosen(process.request.model, fed, row) if sampled and isinstance(row, Sampled) else []
        for token in found:
            process.computed += len(chunks) > 0  # the guess before it was right: its KV counts
            process.charged = max(process.charged, process.computed + 1)
            self._accounting.answered(process.request.tenant, 1)
            try:
                chunks.append(process.append(token, self._flights.now))
            except (
                Exception
            ) as error:  # the image's decoder is a plugin's code: it may fail its process, not the kernel
                failure = as_error(error, ModelError)
                break
            if chunks[-1].finish_reason is not None or chunks[-1].waiting:
                break
        self._pager.list_full(process)
        if fed.guesses:
            self._drafting.checked(process, len(fed.guesses), max(0, len(chunks) - 1))
        if chunks:
            self._tell(process, joined(chunks))
        if failure is not None:
            self.fail(process, failure)

    def _tell(self, process: Process, chunk: Chunk) -> None:
        """What it has said, and what follows from that."""
        if chunk.finish_reason is not None:
            self.end(process, chunk.finish_reason, chunk)
        else:
            self._say(process, chunk)
            if chunk.waiting:
                self.pauses.hold(process)

    def _say(self, process: Process, chunk: Chunk) -> None:
        """Deliver it once what it says is in the journal."""
        said, process.said = process.said, ""
        records = (_took(process.pid, chunk),) if self._outbox.journaled and chunk.token_ids else ()
        self._outbox.say(ev.Deliver(process.pid, chunk, said=said), *records)

    def copied(self, processes: tuple[Process, ...], event: ev.Completed) -> None:
        """The page that they are to write on is there, or not."""
        if event.error is not None:
            for process in processes:
                self._pager.uncopied(process)
                if process.state is not State.ENDED:
                    self.fail(process, as_error(event.error, DriverError))

    def landed(self, process: Process) -> None:
        """An operation that named it has landed."""
        if process.flights:
            return
        if process.state is State.ENDED:
            if self.zombies.pop(process.pid, None) is not None:
                self._pager.release(process)
                self.forks.begin(process)
            return
        self.forks.begin(process)
        self.pauses.stop_if_asked(process)
        self._scheduler.note_pages(process)

    # -- ends --------------------------------------------------------------------------------------------------------

    def end(self, process: Process, reason: FinishReason, last: Chunk | None = None, restored: bool = False) -> None:
        """The process has its answer, or as much of it as there will be. One that ended of itself stays in the journal
        until its reader has it all."""
        self.remove(process)
        records: list[Record] = []
        if last is None:
            last = Chunk(text=process.flush(), finish_reason=reason)
        elif last.token_ids and reason in ("stop", "length") and not restored:
            records.append(_took(process.pid, last))
        if reason not in ("stop", "length"):
            records.append(Done(process.pid))
        whole = process.completion(reason, self._flights.now)
        self._outbox.say(ev.Deliver(process.pid, last, whole, said=process.said), *records)

    def fail(self, process: Process, error: Exception, keep: bool = False) -> None:
        """It ends with an error. `keep` leaves it in the journal, to go on in the kernel's next life."""
        if process.state is State.ENDED:  # its parent, which ended just before it, took it along
            return
        self.remove(process)
        records = () if keep or not process.tokens else (Done(process.pid),)
        self._outbox.say(ev.Deliver(process.pid, error=error), *records)

    def forget(self, event: ev.Forget) -> None:
        if event.pid not in self.live:
            self._outbox.note(Done(event.pid))

    def remove(self, process: Process) -> None:
        """Out of the table; its pages follow when nothing in flight names them."""
        del self.live[process.pid]
        self.sessions.gone(process.pid)
        model = self._residency.models[process.request.model]
        model.live -= 1
        model.blocked -= process.state is State.BLOCKED
        process.state = State.ENDED
        self._scheduler.withdraw(process)
        assert process.reservation is not None
        self._accounting.settle(process.reservation, process.charged)
        self.pauses.gone(process)
        if self._last_end is not None:
            self._between_ends += 0.2 * (self._flights.now - self._last_end - self._between_ends)
        self._last_end = self._flights.now
        if process.flights:
            self.zombies[process.pid] = process
        else:
            self._pager.release(process)
            self.forks.begin(process)

    def _reply(self, ticket: int, error: Exception | None = None) -> None:
        self._flights.emit(ev.Reply(ticket, error))

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def infos(self, now: float) -> list[ProcessInfo]:
        models = self._residency.models
        there = {name for name, model in models.items() if model.where is Where.ON_DEVICE}
        return [process.info(now, process.request.model in there) for process in self.live.values()]


def _took(pid: int, chunk: Chunk) -> Took:
    return Took(pid, chunk.token_ids, tuple((entry.logprob, entry.top) for entry in chunk.logprobs))
