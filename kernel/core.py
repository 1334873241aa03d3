"""The deterministic core: events in, actions out. No clock, no randomness, no threads, no files, no tensors (Rule 1).

    update(events)   what happened: processes come and go, operations complete, answers are delivered
    schedule()       what is next: deadlines, models to bring or to evict, and one batch in flight

The same object runs in production and in simulation. `check()` holds after every step.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_os.kernel import events as ev
from llm_os.kernel import invariants
from llm_os.kernel.accounting import Accounting
from llm_os.kernel.config import Config, parse_bytes
from llm_os.kernel.costs import Costs
from llm_os.kernel.driver import Batch
from llm_os.kernel.driver import Sequence as Rows
from llm_os.kernel.errors import Closed, DriverError, Error, ModelError, ModelNotFound, Refused, StoreError, as_error
from llm_os.kernel.faults import Faults
from llm_os.kernel.flights import Flights
from llm_os.kernel.memory import Memory, MemoryInfo
from llm_os.kernel.outbox import Outbox
from llm_os.kernel.pager import Pager
from llm_os.kernel.process import Process, ProcessInfo, State
from llm_os.kernel.processes import Processes
from llm_os.kernel.residency import AWAY, Model, Residency, Where
from llm_os.kernel.scheduler import Order, Scheduler
from llm_os.kernel.swap import Swap


class Core:
    """One device's kernel, without its surroundings."""

    def __init__(self, config: Config, budget: int) -> None:
        self.config = config
        self.memory = Memory(budget, config.frame_bytes)
        self.flights = Flights()
        costs = Costs()
        self.accounting = Accounting(config.tenants)
        swap = Swap(parse_bytes("swap_host", config.swap_host), parse_bytes("swap_disk", config.swap_disk))
        self.pager = Pager(self.memory, self.flights, costs, swap, config.prefix_cache)
        self.residency = Residency(config, self.memory, self.flights, costs)
        self.outbox = Outbox(self.flights, config.state is not None)
        self.scheduler = Scheduler(config, self.pager, self.accounting, self._spare)
        self.table = Processes(
            config, self.flights, self.outbox, self.pager, self.residency, self.scheduler, self.accounting
        )
        self.faults = Faults(self.residency, self.scheduler, self.pager, self.memory, self.flights)
        self.halting = False
        self._now = 0.0

    @property
    def processes(self) -> dict[int, Process]:
        """Live ones, in order of arrival."""
        return self.table.live

    @property
    def halted(self) -> bool:
        """Nothing is left: the loop around the core may end."""
        return self.halting and not self.flights and not self.outbox and not self.residency.models

    @property
    def wakeup(self) -> float | None:
        """When `step` has to be called even if nothing happens until then."""
        times = [time for time in (self.table.next_deadline, self.faults.wakeup) if time is not None]
        return min(times, default=None)

    def step(self, now: float, events: Sequence[ev.Event]) -> list[ev.Action]:
        """One turn. `now` is in seconds and never goes back."""
        self._now = self.flights.now = now
        self.update(events)
        self.schedule()
        return self.flights.drain()

    # -- update: what happened ---------------------------------------------------------------------------------------

    def update(self, events: Sequence[ev.Event]) -> None:
        table = self.table
        for event in events:
            match event:
                case ev.Completed():
                    self._completed(event)
                case ev.Submit():
                    table.submit(event)
                case ev.Fork():
                    table.fork(event)
                case ev.Restore():
                    table.restore(event)
                case ev.Forget():
                    table.forget(event)
                case ev.Kill():
                    table.kill(event)
                case ev.Renice():
                    table.renice(event)
                case ev.Block():
                    table.block(event)
                case ev.Unblock():
                    table.unblock(event)
                case ev.LoadModel():
                    self._load_model(event)
                case ev.UnloadModel():
                    self._unload_model(event)
                case ev.Pin():
                    self._pin(event)
                case ev.Halt():
                    self._halt()

    def _load_model(self, event: ev.LoadModel) -> None:
        if self.halting:
            self._reply(event.ticket, Closed("the kernel is closed"))
            return
        model = self.residency.open(event.model)
        model.pinned |= event.pin
        if event.prefetch:
            model.prefetch = True
            self._reply(event.ticket)
        elif model.where is Where.ON_DEVICE and not model.leaving:
            self._reply(event.ticket)
        else:
            model.load_tickets.append(event.ticket)

    def _unload_model(self, event: ev.UnloadModel) -> None:
        model = self.residency.models.get(event.model)
        if model is None or self.residency.resting(model):
            self._reply(event.ticket, ModelNotFound(f"{event.model} is not loaded; models() lists what is"))
        elif model.live:
            busy = f"{event.model} has {model.live} live processes; wait for them or kill them before you unload it"
            self._reply(event.ticket, Refused(busy))
        else:
            model.unload_tickets.append(event.ticket)
            model.pinned = model.stuck = False

    def _pin(self, event: ev.Pin) -> None:
        model = self.residency.models.get(event.model)
        if model is None:
            self._reply(event.ticket, ModelNotFound(f"{event.model} is not open; load it first"))
            return
        model.pinned = event.pinned
        self._reply(event.ticket)

    def _reply(self, ticket: int, error: Exception | None = None) -> None:
        self.flights.emit(ev.Reply(ticket, error))

    def _halt(self) -> None:
        self.halting = self.table.halting = True
        for process in list(self.processes.values()):
            self.table.fail(process, Closed("the kernel was closed"), keep=True)

    # -- operations that completed -----------------------------------------------------------------------------------

    def _completed(self, event: ev.Completed) -> None:
        flight = self.flights.land(event.operation)
        if flight is None:  # a driver that completes an operation twice
            return
        operation = flight.operation
        match operation:
            case ev.Open(_, name):
                self._opened(self.residency.models[name], event)
            case ev.Encode():
                self.table.encoded(flight.processes[0], event)
            case ev.Load(_, name):
                self._loaded(self.residency.models[name], event, self._now - flight.started)
            case ev.Unload(_, name):
                self._unloaded(self.residency.models[name], event)
            case ev.Release(_, name):
                self._released(self.residency.models[name], event)
            case ev.Prefetch(_, name):
                model = self.residency.models[name]
                if event.error is None and model.where is Where.ON_DISK:
                    model.where = Where.IN_HOST
            case ev.Copy() | ev.SwapOut() | ev.SwapIn() | ev.Demote():
                lost = self.pager.landed(flight, event)
                if lost:
                    for process in self.processes.values():
                        self.pager.truncate(process, lost)
                if isinstance(operation, ev.Copy):
                    self._copied(flight.places, flight.processes, event)
            case ev.Journal():
                if event.error is None:
                    self.outbox.written()
                else:
                    self._unwritten(operation, as_error(event.error, StoreError))
            case ev.Run():
                self.table.ran(operation.batch, flight.processes, event, self._now - flight.started)
        for process in flight.processes:
            self.table.landed(process)

    def _opened(self, model: Model, event: ev.Completed) -> None:
        if event.error is not None or not isinstance(event.result, ev.Opened):
            model.where = Where.ON_DISK
            error = event.error or ModelError(f"opening {model.name} gave {type(event.result).__name__}, no image")
            self._fail_model(model, as_error(error, ModelNotFound))
            return
        before = model.slab
        try:
            changed = self.residency.opened(model, event.result)
        except Error as error:
            self._fail_model(model, error)
            return
        if changed and before is not None:
            self.pager.forget(before)
            if model.kv_on_device:
                self.residency.release_kv(model)
        if not model.leaving and not self.halting:
            self.table.opened(model)

    def _loaded(self, model: Model, event: ev.Completed, seconds: float) -> None:
        if event.error is not None:
            self.residency.not_loaded(model)
            self._fail_model(model, as_error(event.error, DriverError))
            return
        self.residency.loaded(model, seconds)

    def _unloaded(self, model: Model, event: ev.Completed) -> None:
        if event.error is None or self.halting:  # closing the driver will free what it could not unload
            self.residency.evicted(model)
        else:
            self.residency.not_evicted(model, as_error(event.error, DriverError))
            self.table.opened(model)

    def _released(self, model: Model, event: ev.Completed) -> None:
        self.residency.released(model)
        if event.error is not None:
            self._fail_model(model, as_error(event.error, DriverError))

    def _copied(self, places: tuple[int, ...], processes: tuple[Process, ...], event: ev.Completed) -> None:
        if not places:  # copy on write
            if event.error is not None:
                for process in processes:
                    self.pager.uncopied(process)
                    if process.state is not State.ENDED:
                        self.table.fail(process, as_error(event.error, DriverError))
            return
        for model in self.residency.models.values():
            if model.where is Where.LOADING and not self.flights.busy(model.name):
                if event.error is None:
                    self.residency.load_if_clear(model)
                elif not self.memory.clear(model.name):
                    self.residency.not_loaded(model)
                    self._fail_model(model, as_error(event.error, DriverError))

    def _unwritten(self, journal: ev.Journal, error: Error) -> None:
        """Records may be lost: who depends on them is told so, and ends."""
        for pid in sorted(self.outbox.failed(journal.records, error)):
            if process := self.processes.get(pid):
                self.table.remove(process)

    def _fail_model(self, model: Model, error: Exception) -> None:
        """The model cannot be had: tell all who wait for it."""
        model.failure, model.pinned = error, False
        for ticket in (*model.load_tickets, *model.unload_tickets):
            self._reply(ticket, error)
        model.load_tickets.clear()
        model.unload_tickets.clear()
        for process in self.table.of(model):
            self.table.fail(process, error)

    # -- schedule: what is next --------------------------------------------------------------------------------------

    def schedule(self) -> None:
        self.table.expire(self._now)
        for model in list(self.residency.models.values()):
            self._tidy(model)
        self.pager.demote()
        before = None
        if not self.halting:
            before = self.faults.serve(self._now, self.processes.values, self._fail_model)
        if not self.flights.flying(ev.Run):
            self._run_next(before)
        self.outbox.flush()

    def _tidy(self, model: Model) -> None:
        """One step of a model that leaves, or whose KV nobody wants any more."""
        if self.flights.busy(model.name):
            return
        leaving = model.leaving or self.halting
        if leaving and model.slab is not None and len(self.pager.cache):
            self.pager.forget(model.slab)
        if model.where is Where.ON_DEVICE and leaving:
            self.residency.evict(model)
        elif model.where in AWAY and model.kv_on_device and not self.memory.slabs[model.name].used:
            if leaving or not model.live:
                self.residency.release_kv(model)
        elif model.where in (*AWAY, Where.OPENING) and not model.kv_on_device and not self.flights.concern(model.name):
            self._at_rest(model)
        elif model.prefetch and model.where is Where.ON_DISK:
            self.residency.fetch(model)

    def _at_rest(self, model: Model) -> None:
        """Nothing of it is on the device, and nothing is in flight for it."""
        waited_for = bool(model.load_tickets or model.live)
        if model.failure is not None or self.halting:
            for ticket in model.unload_tickets:
                self._reply(ticket)
            model.unload_tickets.clear()
        if self.halting:
            for ticket in model.load_tickets:
                self._reply(ticket, Closed("the kernel was closed"))
            self.residency.forget(model)
        elif model.failure is not None and not waited_for:
            self.residency.forget(model)
        elif model.failure is not None:  # they came after it had failed: try again, for them
            model.failure = None
            self.residency.look_again(model)
        elif model.unload_tickets:
            self.residency.rest(model)
            if waited_for:  # they came on its way out
                self.residency.look_again(model)
        elif model.prefetch:
            self.residency.fetch(model)
        elif not waited_for:
            self.residency.rest(model)

    def _run_next(self, before: Order | None) -> None:
        """Start a batch of the model whose turn it is, if any has one."""
        models = [m for m in self.residency.models.values() if m.where is Where.ON_DEVICE and not m.draining]
        if self.halting:
            models = []
        waits = False
        while not waits:
            starved = self.scheduler.admit(models, self._now, before)
            if starved is None or self.scheduler.running:
                starved = self._run_first(models)
            waits = starved is None or not self._starved(starved)

    def _run_first(self, models: list[Model]) -> Process | None:
        """Start a batch; or say who starves."""
        for model in self.scheduler.ranked(models, self._now):
            batch, starved = self.scheduler.plan(model, self._now)
            if batch:
                self._run(model, batch)
            if batch or starved is not None:
                return None if batch else starved
        return None

    def _run(self, model: Model, batch: list[tuple[Process, int]]) -> None:
        sequences = []
        for process, count in batch:
            assert process.table is not None
            process.state = State.RUNNING
            self.scheduler.runs(process, self._now)
            position = process.computed
            sequences.append(
                Rows(
                    pid=process.pid,
                    salt=process.salt,
                    tokens=tuple(process.tokens[position : position + count]),
                    position=position,
                    pages=process.table.numbers(),
                    sample=process.sample() if count == process.remaining else None,
                )
            )
            if process.admitted is None:
                process.admitted = self._now
        model.last_run = self.flights.next_id()
        run = ev.Run(model.last_run, Batch(model=model.name, sequences=tuple(sequences)))
        self.flights.start(run, tuple(process for process, _ in batch))

    def _starved(self, process: Process) -> bool:
        """No other process has memory to give. Other models have, or what is in flight; if not, memory is full: an
        open-ended answer ends here, a promised length cannot be kept. True if it has ended: others may go on."""
        moving = (ev.Copy, ev.SwapOut, ev.SwapIn, ev.Demote, ev.Load, ev.Unload, ev.Release)
        if self.flights.flying(*moving) or self.faults.displace_any(process, self._now):
            return False
        if process.request.sampling.max_tokens is None and process.generated:
            self.table.end(process, "length")
        else:
            full = (
                f"memory is full after {len(process.tokens)} tokens; lower max_tokens, unload a model or raise memory"
            )
            self.table.fail(process, Refused(full))
        return True

    def _spare(self, model: Model) -> bool:
        """Start to evict an idle model other than this one, or wait for one that is on its way."""
        if self.flights.flying(ev.Unload, ev.Release):
            return True
        idle = self.residency.idle()
        if idle is None or idle is model:
            return False
        self.residency.evict(idle)
        return True

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def ps(self) -> list[ProcessInfo]:
        return self.table.infos(self._now)

    def memory_info(self) -> MemoryInfo:
        return self.residency.memory_info(self.pager.swap)

    def check(self) -> None:
        """The invariants of the ledger and the process table. Raises AssertionError."""
        invariants.check(self)
