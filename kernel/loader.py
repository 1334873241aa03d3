"""How models come and go: who asks for them, what came of it, and who is told. Decides no evictions (`faults.py`), and
claims nothing (`residency.py`).

load, pin, prefetch ──> opened ──> loaded ──> unloaded ──> released ──> at rest, or forgotten
                           └────── failed: all who wait for it end
"""

from __future__ import annotations

from llm_os.kernel import events as ev
from llm_os.kernel.errors import Closed, DriverError, Error, ModelError, ModelNotFound, Refused, as_error
from llm_os.kernel.flights import Flights
from llm_os.kernel.memory import Memory
from llm_os.kernel.pager import Pager
from llm_os.kernel.processes import Processes
from llm_os.kernel.residency import AWAY, Model, Residency, Where

_NOWHERE = (*AWAY, Where.OPENING)  # on no device


class Loader:
    """Answers for the models of one device."""

    def __init__(self, residency: Residency, table: Processes, pager: Pager, memory: Memory, flights: Flights) -> None:
        self._residency = residency
        self._table = table
        self._pager = pager
        self._memory = memory
        self._flights = flights

    # -- calls -------------------------------------------------------------------------------------------------------

    def load(self, event: ev.LoadModel) -> None:
        if self._table.halting:
            self._reply(event.ticket, Closed("the kernel is closed"))
            return
        model = self._residency.open(event.model)
        model.pinned |= event.pin
        if event.prefetch:
            model.prefetch, model.far = True, False
            self._reply(event.ticket)
        elif model.where is Where.ON_DEVICE and not model.leaving:
            self._reply(event.ticket)
        else:
            model.load_tickets.append(event.ticket)

    def unload(self, event: ev.UnloadModel) -> None:
        model = self._residency.models.get(event.model)
        if model is None or self._residency.resting(model):
            self._reply(event.ticket, ModelNotFound(f"{event.model} is not loaded; models() lists what is"))
        elif model.live:
            busy = f"{event.model} has {model.live} live processes; wait for them or kill them before you unload it"
            self._reply(event.ticket, Refused(busy))
        else:
            model.unload_tickets.append(event.ticket)
            model.pinned = model.stuck = False

    def pin(self, event: ev.Pin) -> None:
        model = self._residency.models.get(event.model)
        if model is None:
            self._reply(event.ticket, ModelNotFound(f"{event.model} is not open; load it first"))
            return
        model.pinned = event.pinned
        self._reply(event.ticket)

    def _reply(self, ticket: int, error: Exception | None = None) -> None:
        self._flights.emit(ev.Reply(ticket, error))

    # -- operations that completed -----------------------------------------------------------------------------------

    def opened(self, name: str, event: ev.Completed) -> None:
        model = self._residency.models[name]
        if event.error is not None or not isinstance(event.result, ev.Opened):
            model.where = Where.ON_DISK
            error = event.error or ModelError(f"opening {model.name} gave {type(event.result).__name__}, no image")
            self.fail(model, as_error(error, ModelNotFound))
            return
        before = model.slab
        try:
            changed = self._residency.opened(model, event.result)
        except Error as error:
            self.fail(model, error)
            return
        if changed and before is not None:
            self._pager.forget(before)
            if model.kv_on_device:
                self._residency.release_kv(model)
        if name in self._residency.unreleased:
            self._residency.release_kv(model)
        if not model.leaving and not self._table.halting:
            self._table.opened(model)

    def prefetched(self, name: str, event: ev.Completed) -> None:
        model = self._residency.models[name]
        if event.error is not None:
            model.far = True
        elif model.where is Where.ON_DISK:
            model.where = Where.IN_HOST

    def loaded(self, name: str, event: ev.Completed, seconds: float) -> None:
        model = self._residency.models[name]
        if event.error is not None:
            self._residency.not_loaded(model)
            self.fail(model, as_error(event.error, DriverError))
            return
        self._residency.loaded(model, seconds)

    def unloaded(self, name: str, event: ev.Completed) -> None:
        model = self._residency.models[name]
        if event.error is None or self._table.halting:  # closing the driver will free what it could not unload
            self._residency.evicted(model)
        else:
            self._residency.not_evicted(model, as_error(event.error, DriverError))
            self._table.opened(model)

    def released(self, name: str, event: ev.Completed) -> None:
        model = self._residency.models[name]
        self._residency.released(model, event.error is not None)
        if event.error is not None:
            self.fail(model, as_error(event.error, DriverError))

    def moved(self, event: ev.Completed) -> None:
        """Pages have moved, or not: out of the way of a model, it may be."""
        for model in self._residency.models.values():
            if model.where is Where.LOADING and not self._flights.busy(model.name):
                if event.error is None:
                    self._residency.load_if_clear(model)
                elif not self._memory.clear(model.name):
                    self._residency.not_loaded(model)
                    self.fail(model, as_error(event.error, DriverError))

    def fail(self, model: Model, error: Exception) -> None:
        """The model cannot be had: tell all who wait for it."""
        model.failure, model.pinned = error, False
        for ticket in (*model.load_tickets, *model.unload_tickets):
            self._reply(ticket, error)
        model.load_tickets.clear()
        model.unload_tickets.clear()
        for process in self._table.of(model):
            self._table.fail(process, error)

    # -- what is next ------------------------------------------------------------------------------------------------

    def tidy(self) -> None:
        """One step of each model that leaves, or whose KV nobody wants any more."""
        for model in list(self._residency.models.values()):
            if not self._flights.busy(model.name):
                self._tidy(model)

    def _tidy(self, model: Model) -> None:
        leaving = model.leaving or self._table.halting
        if leaving and model.slab is not None and len(self._pager.cache):
            self._pager.forget(model.slab)
        if leaving and model.where is Where.ON_DEVICE:
            self._residency.evict(model)
        elif model.where in AWAY and model.kv_on_device and not self._memory.slabs[model.name].used:
            if leaving or not model.live:
                self._residency.release_kv(model)
        elif model.where in _NOWHERE and not model.kv_on_device and not self._flights.concern(model.name):
            self._at_rest(model)

    def _at_rest(self, model: Model) -> None:
        """Nothing of it is on the device, and nothing is in flight for it."""
        residency, halting = self._residency, self._table.halting
        waited_for = bool(model.load_tickets or model.live)
        if model.failure is not None or halting:
            for ticket in model.unload_tickets:
                self._reply(ticket)
            model.unload_tickets.clear()
        if halting:
            for ticket in model.load_tickets:
                self._reply(ticket, Closed("the kernel was closed"))
            residency.forget(model)
        elif model.failure is not None and not waited_for:
            residency.forget(model)
        elif model.failure is not None:  # they came after it had failed: try again, for them
            model.failure = None
            residency.look_again(model)
        elif model.unload_tickets:
            residency.rest(model)
            if waited_for:  # they came on its way out
                residency.look_again(model)
        elif model.prefetch:
            residency.fetch(model)
        elif not waited_for:
            residency.rest(model)
