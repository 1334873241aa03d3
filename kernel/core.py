"""The deterministic core: events in, actions out. No clock, no randomness, no threads, no files, no tensors (Rule 1).

    update(events)   what happened: processes come and go, operations complete, answers are delivered
    schedule()       what is next: unload what was asked for, and keep one batch in flight

The same object runs in production and in simulation. `check()` holds after every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llm_os.kernel import events as ev
from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, Move, Row, RowError, Sampled
from llm_os.kernel.driver import Sequence as Rows
from llm_os.kernel.errors import Closed, DriverError, Error, ModelError, ModelNotFound, Refused, RequestError, as_error
from llm_os.kernel.flights import Flight, Flights
from llm_os.kernel.memory import Memory
from llm_os.kernel.page_table import PageTable
from llm_os.kernel.process import Process, ProcessInfo, State
from llm_os.kernel.request import Chunk, FinishReason
from llm_os.kernel.residency import Model, Residency, Where
from llm_os.kernel.scheduler import Scheduler


class Core:
    """One device's kernel, without its surroundings."""

    def __init__(self, config: Config, budget: int) -> None:
        self.config = config
        self.memory = Memory(budget, config.frame_bytes)
        self.flights = Flights()
        self.residency = Residency(self.memory, self.flights, config.page_tokens)
        self.scheduler = Scheduler(config.batch_tokens, config.batch_size)
        self.processes: dict[int, Process] = {}  # in order of arrival
        self.halting = False
        self._now = 0.0

    @property
    def halted(self) -> bool:
        """Nothing is left: the loop around the core may end."""
        return self.halting and not self.flights and not self.residency.models

    def step(self, now: float, events: Sequence[ev.Event]) -> list[ev.Action]:
        """One turn. `now` is in seconds and never goes back."""
        self._now = now
        self.update(events)
        self.schedule()
        return self.flights.drain()

    # -- update: what happened ---------------------------------------------------------------------------------------

    def update(self, events: Sequence[ev.Event]) -> None:
        for event in events:
            match event:
                case ev.Submit():
                    self._submit(event)
                case ev.Fork():
                    self._fork(event)
                case ev.Kill():
                    self._kill(event)
                case ev.Renice():
                    self._renice(event)
                case ev.LoadModel():
                    self._load_model(event)
                case ev.UnloadModel():
                    self._unload_model(event)
                case ev.Halt():
                    self._halt()
                case ev.Completed():
                    self._completed(event)

    def _submit(self, event: ev.Submit) -> None:
        if refusal := self._refusal():
            self.flights.emit(ev.Deliver(event.pid, error=refusal))
            return
        request = event.request
        seed = event.seed if request.sampling.seed is None else request.sampling.seed
        process = self.processes[event.pid] = Process(event.pid, request, seed, self._now, nice=request.nice)
        model = self.residency.open(request.model)
        if model.where not in (Where.OPENING, Where.EVICTING) and not model.unload_tickets:
            self._encode(process, model)

    def _fork(self, event: ev.Fork) -> None:
        parent = self.processes.get(event.parent)
        refusal = self._refusal()
        if parent is None or parent.table is None:
            missing = f"process {event.parent} has ended or has not started; only a running process can fork"
            refusal = RequestError(missing)
        if refusal or parent is None:
            self.flights.emit(ev.Deliver(event.pid, error=refusal))
            return
        child = Process(event.pid, parent.request, event.seed, self._now, parent.pid, parent.nice)
        self.processes[event.pid] = child
        parent.forks.append(child)
        if parent.state is not State.RUNNING:
            self._branch(parent)

    def _branch(self, parent: Process) -> None:
        """No operation writes the parent's pages now: its children may share them."""
        children, parent.forks = parent.forks, []
        for child in children:
            if child.state is State.ENDED:
                continue
            if parent.state is State.ENDED:
                self._fail(child, RequestError(f"process {parent.pid} ended before it could be forked"))
            else:
                parent.branch(child, self._now)

    def _kill(self, event: ev.Kill) -> None:
        if process := self.processes.get(event.pid):
            self._end(process, "cancelled")
        if event.ticket is not None:
            self.flights.emit(ev.Reply(event.ticket))

    def _renice(self, event: ev.Renice) -> None:
        process = self.processes.get(event.pid)
        if process is not None:
            process.nice = event.nice
        missing = None if process else RequestError(f"there is no process {event.pid}")
        self.flights.emit(ev.Reply(event.ticket, missing))

    def _load_model(self, event: ev.LoadModel) -> None:
        model = self.residency.open(event.model)
        model.load_tickets.append(event.ticket)
        if model.leaving:
            return
        if model.where is Where.ON_DEVICE:
            self.residency.loaded(model)
        elif model.where is Where.ON_DISK:
            self._load(model)

    def _unload_model(self, event: ev.UnloadModel) -> None:
        model = self.residency.models.get(event.model)
        if model is None or (model.where is Where.ON_DISK and not model.used):
            missing = ModelNotFound(f"{event.model} is not loaded; models() lists what is")
            self.flights.emit(ev.Reply(event.ticket, missing))
        elif live := len(self._processes_of(model)):
            busy = f"{event.model} has {live} live processes; wait for them or kill them before you unload it"
            self.flights.emit(ev.Reply(event.ticket, Refused(busy)))
        else:
            model.unload_tickets.append(event.ticket)

    def _halt(self) -> None:
        self.halting = True
        for process in list(self.processes.values()):
            self._fail(process, Closed("the kernel was closed"))

    # -- operations that completed -----------------------------------------------------------------------------------

    def _completed(self, event: ev.Completed) -> None:
        flight = self.flights.land(event.operation)
        match flight.operation:
            case ev.Open(_, name):
                self._opened(self.residency.models[name], event)
            case ev.Encode():
                self._encoded(flight.processes[0], event)
            case ev.Load(_, name):
                self._loaded(self.residency.models[name], event)
            case ev.Unload(_, name):
                self._gone(self.residency.models[name], event.error)
            case ev.Copy():
                self._copied(flight.processes[0], event)
            case ev.Run():
                self._ran(flight, flight.operation, event)

    def _opened(self, model: Model, event: ev.Completed) -> None:
        if event.error is not None:
            self._fail_model(model, as_error(event.error, ModelNotFound))
            return
        self.residency.opened(model, event.result)
        if model.leaving or self.halting:
            return
        for process in self._processes_of(model):
            self._encode(process, model)
        if model.load_tickets:
            self._load(model)

    def _encode(self, process: Process, model: Model) -> None:
        assert model.image is not None
        process.image = model.image
        self.flights.start(ev.Encode(self.flights.next_id(), model.image, process.request), (process,))

    def _encoded(self, process: Process, event: ev.Completed) -> None:
        if process.state is State.ENDED:
            return
        if event.error is not None:
            self._fail(process, as_error(event.error, RequestError))
            return
        try:
            process.admit(event.result)
        except Exception as error:  # the image is a plugin's code
            self._fail(process, as_error(error, RequestError))
            return
        model = self.residency.models[process.request.model]
        if model.where is Where.ON_DEVICE:
            self._make_ready(process, model)
        else:
            process.state, process.faulted = State.LOADING, self._now
            if model.where is Where.ON_DISK:
                self._load(model)

    def _load(self, model: Model) -> None:
        try:
            self.residency.load(model)
        except Error as error:
            self._fail_model(model, error)

    def _loaded(self, model: Model, event: ev.Completed) -> None:
        if event.error is not None:
            self._fail_model(model, as_error(event.error, DriverError))
            return
        self.residency.loaded(model)
        for process in self._processes_of(model):
            if process.state is State.LOADING:
                self._make_ready(process, model)

    def _make_ready(self, process: Process, model: Model) -> None:
        """Admission to the run queue: refuse what could never get the pages that it asks for."""
        assert model.slab is not None
        try:
            model.check_room(self.memory, process.prompt_tokens, process.request.sampling.max_tokens or 1)
        except Refused as refusal:
            self._fail(process, refusal)
            return
        process.table = PageTable(model.slab)
        process.state, process.admitted = State.READY, self._now

    def _copied(self, process: Process, event: ev.Completed) -> None:
        if process.state is State.ENDED:
            return
        process.state = State.READY
        if event.error is not None:
            self._fail(process, as_error(event.error, DriverError))
        self._branch(process)

    def _ran(self, flight: Flight, operation: ev.Run, event: ev.Completed) -> None:
        rows: Sequence[Row] = event.result or ()
        error = event.error
        if error is None and len(rows) != len(flight.processes):
            error = DriverError(f"the driver answered {len(rows)} rows to a batch of {len(flight.processes)}")
        for index, (process, fed) in enumerate(zip(flight.processes, operation.batch.sequences, strict=True)):
            if process.state is State.ENDED:
                continue
            process.state = State.READY
            if error is not None:
                self._fail(process, as_error(error, DriverError))
                continue
            process.computed += len(fed.tokens)
            if fed.sample is not None:
                self._advance(process, rows[index])
            self._branch(process)

    def _advance(self, process: Process, row: Row) -> None:
        """One more token of an answer, or the end of it."""
        if not isinstance(row, Sampled):
            message = row.message if isinstance(row, RowError) else "the driver gave no token for a row"
            self._fail(process, DriverError(message))
            return
        try:
            chunk = process.append(row, self._now)
        except Exception as error:  # the image's decoder is a plugin's code: it may fail its process, not the kernel
            self._fail(process, as_error(error, ModelError))
            return
        if chunk.finish_reason is None:
            self.flights.emit(ev.Deliver(process.pid, chunk))
        else:
            self._end(process, chunk.finish_reason, chunk)

    def _gone(self, model: Model, error: BaseException | None = None) -> None:
        """The model is off the device, or the device failed at it."""
        if error is not None:
            self.residency.forget(model, as_error(error, DriverError))
        elif self.halting:
            self.residency.forget(model)
        else:
            self.residency.rest(model)
        if self.halting:
            for ticket in model.load_tickets:
                self.flights.emit(ev.Reply(ticket, Closed("the kernel was closed")))
        elif model.load_tickets or self._processes_of(model):  # they came on its way out: begin again
            self.residency.open(model.name).load_tickets = model.load_tickets

    # -- ends --------------------------------------------------------------------------------------------------------

    def _end(self, process: Process, reason: FinishReason, last: Chunk | None = None) -> None:
        """The process has its answer, or as much of it as there will be."""
        self._remove(process)
        last = last or Chunk(text=process.flush(), finish_reason=reason)
        self.flights.emit(ev.Deliver(process.pid, last, process.completion(reason, self._now)))

    def _fail(self, process: Process, error: Exception) -> None:
        self._remove(process)
        self.flights.emit(ev.Deliver(process.pid, error=error))

    def _remove(self, process: Process) -> None:
        del self.processes[process.pid]
        process.state = State.ENDED
        if process.table is not None:
            process.table.release()
        self._branch(process)

    def _fail_model(self, model: Model, error: Exception) -> None:
        """The model cannot be had: tell all who wait for it."""
        self.residency.forget(model, error)
        for process in self._processes_of(model):
            self._fail(process, error)

    # -- schedule: what is next --------------------------------------------------------------------------------------

    def schedule(self) -> None:
        busy = self.flights.models
        for model in list(self.residency.models.values()):
            if (self.halting or model.leaving) and model.name not in busy:
                if model.where is Where.ON_DEVICE:
                    self.residency.evict(model)
                else:
                    self._gone(model)
        while not self.flights.running and self._take_turn():
            pass

    def _take_turn(self) -> bool:
        """Start a batch of the first model that has one. True if a process was starved instead: its memory is free now,
        and somebody else may have waited for just that."""
        for model in self.scheduler.ranked(self.residency.models.values(), self.processes.values()):
            turn = self.scheduler.plan(model, list(self.processes.values()))
            for process, move in turn.copies:
                self._copy(process, model, move)
            if turn.batch:
                self._run(model, turn.batch)
                return False
            if turn.starved is not None and not self.flights.hold_pages:
                self._starve(turn.starved)
                return True
        return False

    def _copy(self, process: Process, model: Model, move: Move) -> None:
        assert model.slab is not None
        process.state = State.RUNNING
        model.slab.retain((move.target,))
        copy = ev.Copy(self.flights.next_id(), model.name, (move,))
        self.flights.start(copy, (process,), model.slab, (move.source, move.target))

    def _run(self, model: Model, batch: list[tuple[Process, int]]) -> None:
        assert model.slab is not None
        sequences = []
        for process, count in batch:
            assert process.table is not None
            process.state = State.RUNNING
            position = process.computed
            sequences.append(
                Rows(
                    pid=process.pid,
                    salt=process.salt,
                    tokens=tuple(process.tokens[position : position + count]),
                    position=position,
                    pages=tuple(process.table.pages),
                    sample=process.sample() if count == process.remaining else None,
                )
            )
        pages = tuple(page for sequence in sequences for page in sequence.pages)
        model.slab.retain(pages)
        model.last_run = self.flights.next_id()
        run = ev.Run(model.last_run, Batch(model=model.name, sequences=tuple(sequences)))
        self.flights.start(run, tuple(process for process, _ in batch), model.slab, pages)

    def _starve(self, process: Process) -> None:
        """It is alone and memory is full. An open-ended answer ends here; a promised length cannot be kept."""
        if process.request.sampling.max_tokens is None and process.output:
            self._end(process, "length")
        else:
            full = (
                f"memory is full after {len(process.tokens)} tokens; lower max_tokens, unload a model or raise memory"
            )
            self._fail(process, Refused(full))

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def ps(self) -> list[ProcessInfo]:
        return [process.info(self._now) for process in self.processes.values()]

    def check(self) -> None:
        """The invariants of the ledger and the process table. Raises AssertionError."""
        references: dict[str, Counter[int]] = {}
        for process in self.processes.values():
            if process.table is not None:
                references.setdefault(process.request.model, Counter()).update(process.table.pages)
                assert process.computed <= len(process.table.pages) * process.table.slab.page_tokens
            assert process.state is not State.ENDED and process.computed < max(1, len(process.tokens))
        self.flights.check(references)
        self.memory.check(references)

    def _refusal(self) -> Error | None:
        """Why no process can be added now."""
        if self.halting:
            return Closed("the kernel is closed")
        if len(self.processes) >= self.config.queue_limit:
            return Refused(
                f"{len(self.processes)} processes are live, the most that queue_limit allows; try again later"
            )
        return None

    def _processes_of(self, model: Model) -> list[Process]:
        return [process for process in self.processes.values() if process.request.model == model.name]
