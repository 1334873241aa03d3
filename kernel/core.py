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
from llm_os.kernel.drafter import Drafter
from llm_os.kernel.drafting import Drafting
from llm_os.kernel.driver import Batch
from llm_os.kernel.driver import Sequence as Rows
from llm_os.kernel.errors import Closed, Error, Refused, StoreError, as_error
from llm_os.kernel.faults import Faults
from llm_os.kernel.flights import Flights
from llm_os.kernel.loader import Loader
from llm_os.kernel.memory import Memory, MemoryInfo
from llm_os.kernel.outbox import Outbox
from llm_os.kernel.pager import Pager
from llm_os.kernel.policy import Fair, Policy
from llm_os.kernel.process import Process, ProcessInfo, State
from llm_os.kernel.processes import Processes
from llm_os.kernel.residency import Model, PickVictim, Residency, Where
from llm_os.kernel.scheduler import Order, Scheduler
from llm_os.kernel.swap import Swap


class Core:
    """One device's kernel, without its surroundings."""

    def __init__(
        self,
        config: Config,
        budget: int,
        policy: Policy | None = None,
        pick_victim: PickVictim = lambda models: None,
        drafters: Sequence[Drafter] = (),
    ) -> None:
        """`policy` is Fair by default. `pick_victim` chooses among idle models whose weights may go; None abstains. Of
        `drafters` the first that has an idea is asked no further."""
        policy = policy or Fair()
        self.config = config
        self.memory = Memory(budget, config.frame_bytes)
        self.flights = Flights()
        costs = Costs()
        self.accounting = Accounting(config.tenants, policy)
        swap = Swap(parse_bytes("swap_host", config.swap_host), parse_bytes("swap_disk", config.swap_disk))
        self.pager = Pager(self.memory, self.flights, costs, swap, config.prefix_cache)
        self.residency = Residency(config, self.memory, self.flights, costs, pick_victim)
        self.outbox = Outbox(self.flights, config.state is not None)
        self.scheduler = Scheduler(config, self.pager, self.accounting, policy, self._spare)
        self.drafting = Drafting(config, self.pager, drafters)
        self.table = Processes(
            config,
            self.flights,
            self.outbox,
            self.pager,
            self.residency,
            self.scheduler,
            self.accounting,
            self.drafting,
        )
        self.loader = Loader(self.residency, self.table, self.pager, self.memory, self.flights)
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
                    table.forks.fork(event)
                case ev.Restore():
                    table.sessions.restore(event)
                case ev.Forget():
                    table.forget(event)
                case ev.Kill():
                    table.kill(event)
                case ev.Renice():
                    table.renice(event)
                case ev.Block():
                    table.pauses.block(event)
                case ev.Unblock():
                    table.pauses.unblock(event)
                case ev.Finish():
                    table.pauses.finish(event)
                case ev.LoadModel():
                    self.loader.load(event)
                case ev.UnloadModel():
                    self.loader.unload(event)
                case ev.Pin():
                    self.loader.pin(event)
                case ev.Halt():
                    self._halt()

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
                self.loader.opened(name, event)
            case ev.Encode():
                self.table.encoded(flight.processes[0], event)
            case ev.Compile():
                self.table.compiling.compiled(flight.processes[0], event)
            case ev.Load(_, name):
                self.loader.loaded(name, event, self._now - flight.started)
            case ev.Unload(_, name):
                self.loader.unloaded(name, event)
            case ev.Release(_, name):
                self.loader.released(name, event)
            case ev.Prefetch(_, name):
                self.loader.prefetched(name, event)
            case ev.Copy() | ev.SwapOut() | ev.SwapIn() | ev.Demote():
                lost = self.pager.landed(flight, event)
                if lost:
                    for process in (*self.processes.values(), *self.table.zombies.values()):
                        self.pager.truncate(process, lost)
                if isinstance(operation, ev.Copy):
                    if flight.places:
                        self.loader.moved(event)
                    else:
                        self.table.copied(flight.processes, event)
            case ev.Journal():
                if event.error is None:
                    self.outbox.written()
                else:
                    self._unwritten(operation, as_error(event.error, StoreError))
            case ev.Run():
                self.table.ran(operation.batch, flight.processes, event, self._now - flight.started)
        for process in flight.processes:
            self.table.landed(process)

    def _unwritten(self, journal: ev.Journal, error: Error) -> None:
        """Records may be lost: who depends on them is told so, and ends."""
        for pid in sorted(self.outbox.failed(journal.records, error)):
            if process := self.processes.get(pid):
                self.table.remove(process)

    # -- schedule: what is next --------------------------------------------------------------------------------------

    def schedule(self) -> None:
        self.table.expire(self._now)
        self.loader.tidy()
        self.pager.swapper.demote()
        before = None
        if not self.halting:
            before = self.faults.serve(self._now, self.processes.values, self.loader.fail)
        if not self.flights.flying(ev.Run):
            self._run_next(before)
        self.outbox.flush()

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
        guesses = self.drafting.guesses(model.name, batch)
        for process, count in batch:
            assert process.table is not None
            process.state = State.RUNNING
            self.scheduler.runs(process, self._now)
            position = process.computed
            sample = process.sample() if count == process.remaining else None
            guessed = guesses.get(process.pid)
            sequences.append(
                Rows(
                    pid=process.pid,
                    salt=process.salt,
                    tokens=tuple(process.tokens[position : position + count]),
                    position=position,
                    pages=process.table.numbers(),
                    sample=sample,
                    guesses=process.guesses(guessed, sample) if guessed and sample else (),
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
        return self.residency.memory_info(self.pager.swapper.swap)

    def check(self) -> None:
        """The invariants of the ledger and the process table. Raises AssertionError."""
        invariants.check(self)
