"""The deterministic core: events in, actions out. No clock, no randomness, no threads, no files, no tensors (Rule 1).

    update(events)   what happened: processes come and go, operations complete, answers are delivered
    schedule()       what is next: unload what was asked for, and keep one batch in flight

The same object runs in production and in simulation. `check()` holds after every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec import Struct

from llm_os.kernel import events as ev
from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, Row, RowError, Sampled
from llm_os.kernel.driver import Sequence as Rows
from llm_os.kernel.errors import Closed, DriverError, Error, ModelNotFound, Refused, RequestError
from llm_os.kernel.memory import Memory, MemoryInfo
from llm_os.kernel.page_table import PageTable
from llm_os.kernel.process import Process, ProcessInfo, State
from llm_os.kernel.request import Chunk, FinishReason
from llm_os.kernel.residency import Model, ModelInfo, Where
from llm_os.kernel.scheduler import Scheduler


class Flight(Struct, frozen=True):
    """An operation in flight, and the pages that it names: they are not reused before it has completed."""

    operation: ev.Operation
    processes: tuple[Process, ...] = ()
    pages: tuple[int, ...] = ()


class Core:
    """One device's kernel, without its surroundings."""

    def __init__(self, config: Config, budget: int) -> None:
        self.config = config
        self.memory = Memory(budget, config.frame_bytes)
        self.scheduler = Scheduler(config.batch_tokens, config.batch_size)
        self.processes: dict[int, Process] = {}  # in order of arrival
        self.models: dict[str, Model] = {}
        self.halting = False
        self._flights: dict[int, Flight] = {}
        self._operations = 0
        self._actions: list[ev.Action] = []
        self._now = 0.0

    @property
    def halted(self) -> bool:
        """Nothing is left: the loop around the core may end."""
        return self.halting and not self._flights and not self.models

    def step(self, now: float, events: Sequence[ev.Event]) -> list[ev.Action]:
        """One turn. `now` is in seconds and never goes back."""
        self._now = now
        self.update(events)
        self.schedule()
        actions, self._actions = self._actions, []
        return actions

    # -- update: what happened ---------------------------------------------------------------------------------------

    def update(self, events: Sequence[ev.Event]) -> None:
        for event in events:
            match event:
                case ev.Submit():
                    self._submit(event)
                case ev.Fork():
                    self._fork(event)
                case ev.Kill(pid, reply_to):
                    if process := self.processes.get(pid):
                        self._end(process, "cancelled")
                    if reply_to is not None:
                        self._emit(ev.Reply(reply_to))
                case ev.Renice(ticket, pid, nice):
                    self._renice(ticket, pid, nice)
                case ev.LoadModel(ticket, name):
                    self._load_model(ticket, name)
                case ev.UnloadModel(ticket, name):
                    self._unload_model(ticket, name)
                case ev.Halt():
                    self.halting = True
                    for process in list(self.processes.values()):
                        self._end(process, "cancelled", Closed("the kernel was closed"))
                case ev.Completed():
                    self._completed(event)

    def _submit(self, event: ev.Submit) -> None:
        if self.halting:
            self._emit(ev.Deliver(event.pid, error=Closed("the kernel is closed")))
        elif len(self.processes) >= self.config.queue_limit:
            full = (
                f"{len(self.processes)} processes are live, queue_limit is {self.config.queue_limit}; try again later"
            )
            self._emit(ev.Deliver(event.pid, error=Refused(full)))
        else:
            request = event.request
            seed = event.seed if request.sampling.seed is None else request.sampling.seed
            process = Process(event.pid, request, seed, self._now, nice=request.nice)
            self.processes[event.pid] = process
            model = self._open(request.model)
            if model.image is not None and model.where is not Where.EVICTING:
                self._encode(process, model)

    def _encode(self, process: Process, model: Model) -> None:
        assert model.image is not None
        process.image = model.image
        self._start(ev.Encode(self._next(), model.image, process.request), (process,))

    def _fork(self, event: ev.Fork) -> None:
        parent = self.processes.get(event.parent)
        if parent is None or parent.table is None:
            missing = f"process {event.parent} has ended or has not started; only a running process can fork"
            self._emit(ev.Deliver(event.pid, error=RequestError(missing)))
        elif parent.state is State.RUNNING:
            parent.forks.append((event.pid, event.seed))  # its pages are being written: when the batch has ended
        elif len(self.processes) >= self.config.queue_limit:
            self._emit(ev.Deliver(event.pid, error=self._queue_full()))
        else:
            self.processes[event.pid] = parent.fork(event.pid, event.seed, self._now)

    def _renice(self, ticket: int, pid: int, nice: int) -> None:
        process = self.processes.get(pid)
        if process is not None:
            process.nice = nice
        self._emit(ev.Reply(ticket, None if process else RequestError(f"there is no process {pid}")))

    def _load_model(self, ticket: int, name: str) -> None:
        if self.halting:
            self._emit(ev.Reply(ticket, Closed("the kernel is closed")))
            return
        model = self._open(name)
        if model.where is Where.ON_DEVICE:
            self._emit(ev.Reply(ticket))
        else:
            model.load_tickets.append(ticket)
            if model.where is Where.ON_DISK:
                self._load(model)

    def _unload_model(self, ticket: int, name: str) -> None:
        model = self.models.get(name)
        live = sum(process.request.model == name for process in self.processes.values())
        if model is None:
            self._emit(ev.Reply(ticket, ModelNotFound(f"{name} is not loaded; models() lists what is")))
        elif live:
            busy = f"{name} has {live} live processes; wait for them or kill them before you unload it"
            self._emit(ev.Reply(ticket, Refused(busy)))
        else:
            model.unload_tickets.append(ticket)

    # -- operations that completed -----------------------------------------------------------------------------------

    def _completed(self, event: ev.Completed) -> None:
        flight = self._flights.pop(event.operation)
        operation = flight.operation
        match operation:
            case ev.Open():
                self._opened(self.models[operation.model], event)
            case ev.Encode():
                self._encoded(flight.processes[0], event)
            case ev.Load():
                self._loaded(self.models[operation.model], event)
            case ev.Unload():
                model = self.models[operation.model]
                model.displace(self.memory)
                self._unloaded(model, None if event.error is None else _as_error(event.error, DriverError))
            case ev.Copy():
                self._release(operation.model, flight)
                self._copied(flight.processes[0], event)
            case ev.Run():
                self._release(operation.batch.model, flight)
                self._ran(flight, operation, event)

    def _opened(self, model: Model, event: ev.Completed) -> None:
        if event.error is not None:
            self._fail_model(model, _as_error(event.error, ModelNotFound))
            return
        model.where, model.image, model.footprint = Where.ON_DISK, event.result.image, event.result.footprint
        for process in self._processes_of(model):
            self._encode(process, model)
        if model.load_tickets:
            self._load(model)

    def _encoded(self, process: Process, event: ev.Completed) -> None:
        if process.state is State.ENDED:
            return
        if event.error is not None:
            self._end(process, "error", _as_error(event.error, RequestError))
            return
        try:
            process.admit(event.result)
        except RequestError as error:
            self._end(process, "error", error)
            return
        model = self.models[process.request.model]
        if model.where is Where.ON_DEVICE:
            self._make_ready(process, model)
        else:
            process.state, process.faulted = State.LOADING, self._now
            if model.where is Where.ON_DISK:
                self._load(model)

    def _load(self, model: Model) -> None:
        assert model.image is not None
        try:
            placement = model.place(self.memory, self.config.page_tokens)
        except Error as error:
            self._fail_model(model, error)
            return
        model.where = Where.LOADING
        self._start(ev.Load(self._next(), model.name, model.image, placement))

    def _loaded(self, model: Model, event: ev.Completed) -> None:
        if event.error is not None:
            model.displace(self.memory)
            self._fail_model(model, _as_error(event.error, DriverError))
            return
        model.where = Where.ON_DEVICE
        for ticket in model.load_tickets:
            self._emit(ev.Reply(ticket))
        model.load_tickets.clear()
        for process in self._processes_of(model):
            if process.state is State.LOADING:
                self._make_ready(process, model)

    def _make_ready(self, process: Process, model: Model) -> None:
        """Admission to the run queue: refuse what could never get the pages that it asks for."""
        assert model.slab is not None
        wanted = process.prompt_tokens + (process.request.sampling.max_tokens or 1)
        needed = model.slab.frames_for(wanted)
        possible = self.memory.frames - self.memory.extent_frames
        if needed > possible:
            frame = self.memory.frame_size
            self._end(
                process,
                "error",
                Refused(
                    f"{process.prompt_tokens} prompt tokens and {wanted - process.prompt_tokens} more need "
                    f"{needed * frame} bytes of KV; {possible * frame} are left beside the weights; "
                    "lower max_tokens, shorten the prompt, or raise memory"
                ),
            )
            return
        process.table = PageTable(model.slab)
        process.state, process.admitted = State.READY, self._now

    def _copied(self, process: Process, event: ev.Completed) -> None:
        if process.state is State.ENDED:
            return
        process.state = State.READY
        if event.error is not None:
            self._end(process, "error", _as_error(event.error, DriverError))

    def _ran(self, flight: Flight, operation: ev.Run, event: ev.Completed) -> None:
        rows: Sequence[Row] = event.result or ()
        for index, (process, fed) in enumerate(zip(flight.processes, operation.batch.sequences, strict=True)):
            if process.state is State.ENDED:
                continue
            process.state = State.READY
            if event.error is not None:
                self._end(process, "error", _as_error(event.error, DriverError))
                continue
            process.computed += len(fed.tokens)
            row = rows[index]
            if isinstance(row, RowError):
                self._end(process, "error", DriverError(row.message))
            elif isinstance(row, Sampled):
                chunk = process.append(row, self._now)
                if chunk.finish_reason is None:
                    self._emit(ev.Deliver(process.pid, chunk))
                else:
                    self._end(process, chunk.finish_reason, last=chunk)
        for process in flight.processes:
            forks, process.forks = process.forks, []
            for pid, seed in forks:
                self._fork(ev.Fork(pid, process.pid, seed))

    def _unloaded(self, model: Model, error: Exception | None = None) -> None:
        for ticket in model.unload_tickets:
            self._emit(ev.Reply(ticket, error))
        self._forget(model)
        if model.load_tickets or self._processes_of(model):  # they came while it was on its way out: begin again
            self._open(model.name).load_tickets = model.load_tickets

    # -- ends --------------------------------------------------------------------------------------------------------

    def _end(
        self, process: Process, reason: FinishReason, error: Exception | None = None, last: Chunk | None = None
    ) -> None:
        """Take a process out, give back its pages, and deliver the last word."""
        del self.processes[process.pid]
        process.state = State.ENDED
        if process.table is not None:
            process.table.release()
        if error is not None:
            self._emit(ev.Deliver(process.pid, error=error))
            return
        last = last or Chunk(text=process.flush(), finish_reason=reason)
        self._emit(ev.Deliver(process.pid, last, process.completion(reason, self._now)))

    def _fail_model(self, model: Model, error: Exception) -> None:
        """The model cannot be had: tell all who wait for it."""
        for ticket in (*model.load_tickets, *model.unload_tickets):
            self._emit(ev.Reply(ticket, error))
        self._forget(model)
        for process in list(self._processes_of(model)):
            self._end(process, "error", error)

    def _forget(self, model: Model) -> None:
        del self.models[model.name]
        if model.image is not None:
            self._emit(ev.Close(model.image))

    # -- schedule: what is next --------------------------------------------------------------------------------------

    def schedule(self) -> None:
        busy = {_model_of(flight.operation) for flight in self._flights.values()}
        for model in list(self.models.values()):
            if (self.halting or model.unload_tickets) and model.name not in busy:
                if model.where is Where.ON_DEVICE:
                    model.where = Where.EVICTING
                    self._start(ev.Unload(self._next(), model.name))
                elif model.where is Where.ON_DISK:
                    self._unloaded(model)
        running = any(isinstance(flight.operation, ev.Run) for flight in self._flights.values())
        if not running and not self.halting:
            for model in self.scheduler.ranked(self.models.values(), self.processes.values()):
                if self._take_turn(model):
                    return

    def _take_turn(self, model: Model) -> bool:
        """Plan and start the next batch of `model`; whether there was one. Where memory lacks, the next model tries."""
        while True:
            turn = self.scheduler.plan(model, list(self.processes.values()))
            for process, move in turn.copies:
                process.state = State.RUNNING
                assert process.table is not None
                process.table.slab.retain((move.target,))
                copy = ev.Copy(self._next(), model.name, (move,))
                self._start(copy, (process,), (move.source, move.target))
            if turn.batch:
                self._run(model, turn.batch)
            if turn.starved is None or any(flight.pages for flight in self._flights.values()):
                return bool(turn.batch)
            self._starve(turn.starved)

    def _run(self, model: Model, batch: list[tuple[Process, int]]) -> None:
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
        assert model.slab is not None
        model.slab.retain(pages)
        run = ev.Run(self._next(), Batch(model=model.name, sequences=tuple(sequences)))
        model.last_run = run.id
        self._start(run, tuple(process for process, _ in batch), pages)

    def _starve(self, process: Process) -> None:
        """It is alone and memory is full. An open-ended answer ends here; a promised length cannot be kept."""
        if process.request.sampling.max_tokens is None and process.output:
            self._end(process, "length")
        else:
            full = (
                f"memory is full after {len(process.tokens)} tokens; lower max_tokens, unload a model, or raise memory"
            )
            self._end(process, "error", Refused(full))

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def _queue_full(self) -> Refused:
        return Refused(f"{len(self.processes)} processes are live, the most that queue_limit allows; try again later")

    def _open(self, name: str) -> Model:
        """The model of that name; its image is on the way if nobody asked for it before."""
        if name not in self.models:
            self.models[name] = Model(name)
            self._start(ev.Open(self._next(), name))
        return self.models[name]

    def _processes_of(self, model: Model) -> list[Process]:
        return [process for process in self.processes.values() if process.request.model == model.name]

    def _next(self) -> int:
        self._operations += 1
        return self._operations

    def _start(self, operation: ev.Operation, who: tuple[Process, ...] = (), pages: tuple[int, ...] = ()) -> None:
        self._flights[operation.id] = Flight(operation, who, pages)
        self._emit(operation)

    def _release(self, model: str, flight: Flight) -> None:
        slab = self.models[model].slab
        assert slab is not None
        slab.release(flight.pages)

    def _emit(self, action: ev.Action) -> None:
        self._actions.append(action)

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def ps(self, now: float) -> list[ProcessInfo]:
        return [process.info(now) for process in list(self.processes.values())]

    def list_models(self) -> list[ModelInfo]:
        return [model.info(self.memory) for model in list(self.models.values())]

    def memory_info(self) -> MemoryInfo:
        placements = [model.placement for model in self.models.values() if model.placement]
        return self.memory.info([placement.extents[-1] for placement in placements])

    def check(self) -> None:
        """The invariants of the ledger and the process table. Raises AssertionError."""
        references: dict[str, Counter[int]] = {}
        for process in self.processes.values():
            if process.table is not None:
                references.setdefault(process.request.model, Counter()).update(process.table.pages)
                assert process.computed <= len(process.table.pages) * process.table.slab.page_tokens
            assert process.state is not State.ENDED and process.computed < max(1, len(process.tokens))
        mapped = {model: counts.copy() for model, counts in references.items()}
        for flight in self._flights.values():
            if flight.pages:
                references.setdefault(_model_of(flight.operation) or "", Counter()).update(flight.pages)
            if isinstance(flight.operation, ev.Run):
                batch = flight.operation.batch
                slab = self.models[batch.model].slab
                assert slab is not None
                for rows in batch.sequences:
                    for page in rows.pages[rows.position // slab.page_tokens :]:
                        assert mapped.get(batch.model, Counter())[page] <= 1, "a shared page is being written"
        self.memory.check(references)


def _model_of(operation: ev.Operation) -> str | None:
    match operation:
        case ev.Run():
            return operation.batch.model
        case ev.Encode():
            return None
        case _:
            return operation.model


def _as_error(error: BaseException, kind: type[Error]) -> Error:
    """What people see of a failure: our own errors as they are, anything else named by its type."""
    return error if isinstance(error, Error) else kind(f"{type(error).__name__}: {error}")
