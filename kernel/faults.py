"""Model faults: who is wanted on the device and not there, and the next step to bring it. Policy only, no state to rot.

At each turn, for the most urgent model that is wanted: load it if there is room; else take one more step that makes
room (`residency.py` says in which order), or wait for those that are in flight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from llm_os.kernel import events as ev
from llm_os.kernel.errors import Error, Refused
from llm_os.kernel.flights import Flights
from llm_os.kernel.memory import Memory
from llm_os.kernel.pager import Pager
from llm_os.kernel.process import Process, State
from llm_os.kernel.residency import AWAY, Model, Residency, Where
from llm_os.kernel.scheduler import Order, Scheduler

_BY_CALL: Order = (0, -math.inf, 0.0, 0.0, 0)  # a load that was asked for by name


class Faults:
    """Serves model faults. `wakeup` is when a slice ends that somebody waits for."""

    def __init__(
        self, residency: Residency, scheduler: Scheduler, pager: Pager, memory: Memory, flights: Flights
    ) -> None:
        self._residency = residency
        self._scheduler = scheduler
        self._pager = pager
        self._memory = memory
        self._flights = flights
        self.wakeup: float | None = None
        self._waits = False  # for the end of a slice, whenever that may be
        self._needy: Process | None = None  # other models had to go for it: none comes back before it has ended

    def serve(
        self, now: float, processes: Callable[[], Iterable[Process]], fail: Callable[[Model, Error], None]
    ) -> Order | None:
        """Take the next steps. `fail` is told of models that can never be loaded. Returns who must get room before
        anybody after it may be admitted; None if nobody waits for room."""
        self.wakeup, self._waits = None, False
        models = list(self._residency.models.values())
        for model in models:
            model.draining = False
        if self._needy is not None and self._needy.state in (State.ENDED, State.BLOCKED):
            self._needy = None
        for order, model in sorted(self._wanted(models, now), key=_turn):
            try:
                self._residency.check_size(model)
                if self._needy is not None and not self._may_come(model, order, self._needy, now):
                    continue
                if self._bring(model, order, now, processes):
                    continue
            except Error as error:
                fail(model, error)
                continue
            self._residency.fetch(model)
            return None if self._waits else order
        return None

    def _may_come(self, model: Model, order: Order, needy: Process, now: float) -> bool:
        """A process has all memory that its model leaves. Who is more urgent, or has waited for the end of its slice,
        displaces its model; nobody comes in beside it, to be thrown out again for its next page."""
        holder = self._residency.models[needy.request.model]
        if model is holder:
            return True
        urgency = self._scheduler.urgency(needy, now)
        if self._nice(model, now) >= urgency:
            ends = self._residency.slice_ends(holder, model)
            if holder.fixed or order[0] > urgency:
                return False
            if now < ends:
                self._wait(ends)
                return False
        self._needy = None
        if holder.where is Where.ON_DEVICE and not holder.fixed:
            self.displace(holder, now)
        return True

    def _nice(self, model: Model, now: float) -> int:
        """The nice of the one who would be admitted with it: nobody passes the first, whatever his nice."""
        first = self._scheduler.first(model.name, now)
        return min([*([first[1].nice] if first else []), *([0] if model.load_tickets else [])])

    def _wait(self, until: float) -> None:
        self._waits = True
        if until < math.inf:
            self.wakeup = until if self.wakeup is None else min(self.wakeup, until)

    def _wanted(self, models: Iterable[Model], now: float) -> list[tuple[Order, Model]]:
        wanted = []
        for model in models:
            if model.where in AWAY and not model.leaving:
                first = self._scheduler.first(model.name, now)
                orders = [first[0]] if first else []
                if model.load_tickets:
                    orders.append(_BY_CALL)
                if orders:
                    wanted.append((min(orders), model))
        return wanted

    def _bring(self, model: Model, order: Order, now: float, processes: Callable[[], Iterable[Process]]) -> bool:
        """True if its load has begun. If not, an operation is in flight after which it is tried again, or it waits for
        others to end."""
        while (done := self._approach(model, order, now, processes)) is None:
            continue  # room was there at once: nothing in flight would bring us back here
        return done

    def _approach(
        self, model: Model, order: Order, now: float, processes: Callable[[], Iterable[Process]]
    ) -> bool | None:
        """One step. None if there is more room now."""
        missing = self._residency.frames_missing(model)
        if 0 < missing <= self._memory.reclaimable:
            self._pager.free_frames(missing)
            missing = self._residency.frames_missing(model)
        if self._flights.flying(ev.Unload, ev.Release, ev.SwapOut):
            return False  # room is on its way
        quiet = not self._flights.flying(ev.Run, ev.Load, ev.Copy, ev.SwapIn)
        if missing <= 0:
            move_out = None if self._flights.flying(ev.Run) else lambda pages: self._pager.move_out(pages, processes())
            if self._residency.place(model, move_out):
                return True
            if not quiet:
                return False  # pages that are in use now may move out of the way then
        alone = self._residency.alone(model, used=missing <= 0)
        if self._free_weights(model, order, now):
            return False
        if missing > 0 and (process := self._holder(model, now)) is not None:
            at_once = self._pager.take(process)
            self._scheduler.note_pages(process)
            return None if at_once else False
        if not self._waits and quiet and alone:
            fixed = "does not fit between the models that cannot be evicted"
            raise Refused(f"{model.name} {fixed}; unpin one, or load it before them")
        return False

    def _free_weights(self, model: Model, order: Order, now: float) -> bool:
        """Start to evict another model, if one may go."""
        idle = self._residency.idle()
        if idle is not None:
            self._residency.evict(idle)
            return True
        victim = self._displaceable(model, order, self._nice(model, now), now)
        if victim is not None:
            self.displace(victim, now)
        return victim is not None

    def _holder(self, model: Model, now: float) -> Process | None:
        """Whose pages go for it."""
        return self._scheduler.last_idle() or self._scheduler.last_active(self._nice(model, now), now)

    def _displaceable(self, newcomer: Model, order: Order, nice: int, now: float) -> Model | None:
        """A model all of whose processes are of a later class than `nice`, or that has had its slice and none of whose
        processes comes before the newcomer's by class and share: else it would come back at once."""
        found: list[tuple[int, float, Model]] = []
        for model in self._residency.models.values():
            if model.where is Where.ON_DEVICE and not model.fixed:
                standing = self._scheduler.standing(model.name, now)
                if standing is None:  # nobody runs or waits with it now, though somebody may soon
                    found.append((0, model.loaded_at, model))
                    continue
                ends = self._residency.slice_ends(model, newcomer)
                if standing[0] > nice or (standing >= order[:2] and now >= ends):
                    found.append((-standing[0], model.loaded_at, model))
                elif standing >= order[:2]:
                    self._wait(ends)
        return min(found, key=lambda entry: entry[:2])[2] if found else None

    def displace(self, model: Model, now: float) -> None:
        """Suspend its processes and evict it, as soon as no operation in flight names it."""
        model.draining = True
        if not self._flights.busy(model.name):
            for process in self._scheduler.active(model.name):
                self._scheduler.suspend(process, now)
            self._residency.evict(model)

    def displace_any(self, process: Process, now: float) -> bool:
        """For a process that has all other memory already: another model has to go. False if none can."""
        model = self._residency.models[process.request.model]
        others = [
            m
            for m in self._residency.models.values()
            if m is not model and m.where is Where.ON_DEVICE and not m.fixed and not self._flights.busy(m.name)
        ]
        if not others:
            return False
        self._needy = process
        self.displace(min(others, key=lambda m: m.rent), now)
        return True


def _turn(wanted: tuple[Order, Model]) -> tuple[int, float, int, float, float, int]:
    """By class and share; of equals, the model that has not run for longest."""
    (urgency, share, rank, since, pid), model = wanted
    return urgency, share, model.last_run, rank, since, pid
