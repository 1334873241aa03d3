"""A real core in a world of virtual time, where every operation takes as long as it likes and anything may break.

    turn: what comes, what completes ──events──> core.step ──actions──> judged, then on their way
                        ^                                                     │
                        └── due, in any order, also after an abort <──────────┘

Everything that is decided goes through the chooser; every step is judged. Raises Violation.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from heapq import heappop, heappush
from typing import Any

from llm_os.drivers.sim import SimImage
from llm_os.drivers.simulation import host
from llm_os.drivers.simulation.chooser import Chooser
from llm_os.drivers.simulation.device import Device
from llm_os.drivers.simulation.drafter import SimDrafter
from llm_os.drivers.simulation.faults import Faults
from llm_os.drivers.simulation.fences import Fences
from llm_os.drivers.simulation.judge import CLASSES, Judge
from llm_os.drivers.simulation.plan import UNIT, Options, draw
from llm_os.drivers.simulation.state import State
from llm_os.drivers.simulation.trace import Trace
from llm_os.drivers.simulation.violation import Violation, insist
from llm_os.drivers.simulation.workload import Workload
from llm_os.kernel import events as ev
from llm_os.kernel.core import Core

_HANG = 60_000
_PLACES: dict[type, tuple[str, int]] = {  # where faults are looked up, and how many units it takes at most
    ev.Run: ("run", 30),
    ev.Load: ("load", 200),
    ev.Unload: ("unload", 30),
    ev.Release: ("unload", 5),
    ev.Copy: ("copy", 15),
    ev.Open: ("open", 60),
    ev.Encode: ("encode", 15),
    ev.Prefetch: ("load", 200),
    ev.Journal: ("journal", 15),
    ev.SwapOut: ("swap", 0),  # as the plan says
    ev.SwapIn: ("swap", 0),
    ev.Demote: ("swap", 0),
}


class World:
    """One run. `run()` plays it; the counters say what happened."""

    def __init__(self, options: Options, chooser: Chooser, *, tell: bool = False) -> None:
        self.options = options
        self.chooser = chooser
        self.faults = Faults(chooser, options.faults, options.fail_call)
        self.plan = draw(chooser)
        self.workload = Workload(self.plan, chooser)
        self.judge = Judge(self.plan, self.workload)
        self.state = State(self.plan.config, self.faults, chooser)
        self.steps = 0
        self.clock = 0  # in units
        self.actions: Counter[str] = Counter()
        self.trace = Trace(tell)
        self.boot()

    @property
    def now(self) -> float:
        return self.clock * UNIT

    def boot(self) -> None:
        """A new core on a new device, with what the disk has."""
        config = self.plan.config
        self.core = Core(config, config.budget(0), drafters=(SimDrafter(self.workload.stories, self.chooser),))
        self.device = Device(config)
        self.device.chooser = self.chooser
        self.fences = Fences(config, self.core.memory.frames)
        self.flying: list[tuple[int, int, ev.Operation, str | None]] = []  # heap: when, which, what, what goes wrong
        self.images: list[Any] = []  # open
        self.written = 0  # when the last journal operation will have been
        self.next: list[ev.Event] = self.judge.crashed(self.state.boot(self.device, self.fences), self.now)

    # -- turns -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while self.steps < self.options.steps:
            self.turn()
        self.faults.stop()
        self.settle()

    def turn(self) -> None:
        self.chooser.turn()
        events, self.next = self.next, []
        stirs, fault = self.workload.stirs(), self.faults.at("turn")
        completed = self._due(bool(events or stirs or fault))
        events += self.workload.events(self.now) if stirs else []
        events += self._mischief(fault) if fault else []
        self.step(events + completed)
        if (slow := self.judge.stuck(self.now, self.patience)) is not None:
            raise Violation("starvation", f"process {slow.pid} has waited for {self.patience} seconds")

    @cached_property
    def patience(self) -> float:
        """Seconds within which everybody gets a token: those of better classes, then those before it, then its own."""
        config = self.plan.config
        text_s = (1000 + 100 * self.plan.token_units) * UNIT
        return CLASSES * config.aging_s + 3 * config.queue_limit * (text_s + config.slice_s)

    def _due(self, busy: bool) -> list[ev.Event]:
        """What completes now. Time goes on to the next completion, or to when the core wants to be called."""
        wakeup = self.core.wakeup
        due = self.flying[0][0] if self.flying else None
        wanted = None if wakeup is None else max(self.clock + 1, math.ceil(wakeup / UNIT))
        if busy and (due is None or self.chooser.below(2) == 0):
            return []
        if due is None or (wanted is not None and wanted < due):
            self.clock = self.clock + 10 if wanted is None else wanted
            return []
        self.clock = max(self.clock, due)
        events: list[ev.Event] = []
        while self.flying and self.flying[0][0] <= self.clock:
            _, _, operation, fault = heappop(self.flying)
            events.append(self._complete(operation, fault))
        return events

    def step(self, events: list[ev.Event]) -> None:
        """One step of the core, judged; then its actions."""
        self.steps += 1
        now = self.now
        self.judge.asked(events)
        self.trace.events(self.steps, self.clock, events)
        try:
            actions = self.core.step(now, events)
            self.trace.actions(self.steps, actions)
            self.core.check()
        except Exception as error:
            raise _broken(error) from error
        crash = self.faults.at("step") == "crash"
        for action in actions[: self.chooser.below(len(actions) + 1) if crash else None]:
            self.act(action)
        self.judge.stepped(now, sum(not process.restored for process in self.core.processes.values()))
        if crash:
            self.crash()

    def act(self, action: ev.Action) -> None:
        self.actions[type(action).__name__] += 1
        match action:
            case ev.Deliver(pid):
                self.judge.deliver(action, self.now)
                if (action.completion or action.error) and not self._reads_slowly(pid):
                    self.next.append(ev.Forget(pid))
            case ev.Reply():
                self.judge.reply(action)
            case ev.Close(image):
                insist(any(image is each for each in self.images), "close", "an image that is not open")
                self.images = [each for each in self.images if each is not image]
            case ev.Discard(slots):
                self.state.discard(slots)
            case _:
                self._start(action)

    def _reads_slowly(self, pid: int) -> bool:
        if self.faults.at("read whole") is None:
            self.workload.unread = [story for story in self.workload.unread if story.pid != pid]
            return False
        return True

    def _start(self, operation: ev.Operation) -> None:
        self.fences.start(operation)
        if isinstance(operation, ev.Run):
            processes = self.core.processes.items()
            waiting = {pid for pid, process in processes if process.state == "ready" and not process.active}
            self.judge.run(operation, self.now, waiting)
        elif isinstance(operation, ev.Unload):
            self.judge.pins.unload(operation)
        elif isinstance(operation, ev.SwapOut):
            self.state.expect(operation.slots, operation.pages)
        place, slowest = _PLACES[type(operation)]
        fault = self.faults.call(place)
        due = self.clock + 1 + self.chooser.delay(self.plan.swap_units if place == "swap" else slowest)
        if isinstance(operation, ev.Run):
            due += self.plan.token_units * sum(rows.end - rows.position for rows in operation.batch.sequences)
        if fault in ("hang", "plugin_hang"):
            due += _HANG
            self.judge.hangs(self.now, _HANG * UNIT)
        if isinstance(operation, ev.Journal):  # one writer: in order
            self.written = due = max(due, self.written + 1)
        heappush(self.flying, (due, operation.id, operation, fault))

    def _complete(self, operation: ev.Operation, fault: str | None) -> ev.Completed:
        """The operation takes place, at the last moment at which it can."""
        if fault == "device_lost":
            self.device.lost = True
            self.judge.lost()
        try:
            result = self._perform(operation, fault)
        except Exception as error:
            if isinstance(error, Violation):
                raise
            self.fences.end(operation, failed=True)
            self.judge.failed(operation, fault or str(error), self.fences.ready)
            self.judge.swapped_in(operation, (False,), self.now)
            return ev.Completed(operation.id, error=error)
        self.fences.end(operation, failed=False)
        self.judge.succeeded(operation)
        if isinstance(operation, ev.Run):
            self.judge.ran(operation, result, fault, self.now)
        self.judge.swapped_in(operation, result, self.now)
        return ev.Completed(operation.id, result)

    def _perform(self, operation: ev.Operation, fault: str | None) -> Any:
        match operation:
            case ev.Open():
                if fault is None and type(operation.image) is SimImage:
                    fault = self.faults.at("reopen")
                opened = host.open_image(
                    operation, self.device, self.plan.config.batch_tokens, fault, self.chooser, self.workload.images
                )
                if opened.image is not operation.image:
                    self.images.append(opened.image)
                self.judge.opened(operation.model, opened.image)
                return opened
            case ev.Encode():
                tokens = host.tokens_of(operation, fault, self.chooser)
                self.judge.encoded(operation, self.now)
                if fault == "plugin_type":
                    self.judge.mistold(operation, tokens)
                return tokens
            case ev.Journal():
                self.state.append(operation)
                self.judge.written(operation)
                return None
            case ev.SwapOut() | ev.SwapIn() | ev.Demote():
                self.device.fail(fault)
                return self.state.swap(operation)
        return self.device.perform(operation, fault)

    # -- what goes wrong between two steps -----------------------------------------------------------------------------

    def _mischief(self, fault: str) -> list[ev.Event]:
        live = list(self.workload.live.values())
        self.faults.hit[fault] -= 1
        if not live and fault != "bit_flip":
            return []
        events: list[ev.Event] = []
        match fault:
            case "bit_flip":
                if not self.device.flip():
                    return []
            case "disconnect":
                story = self.chooser.pick(live)
                story.gone = True
                events = [self.workload.kill(story, None), ev.Forget(story.pid)]
            case "double_cancel":
                story = self.chooser.pick(live)
                events = [self.workload.kill(story, self.workload.next_id()) for _ in range(2)]
            case "duplicate_id":
                story = self.chooser.pick(live)
                events = [ev.Submit(story.pid, story.request, story.seed + 1)]
        self.faults.hit[fault] += 1
        return events

    def crash(self) -> None:
        """The program dies, maybe while it writes: what is not on the disk is gone."""
        writing = [operation for _, _, operation, _ in sorted(self.flying) if isinstance(operation, ev.Journal)]
        self.state.crash(writing)
        self.boot()

    # -- the end -------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """No more faults: everything ends, and all is as it was."""
        if self.device.lost:
            self.crash()
        self._finish("the end of the faults")
        if self.device.lost:  # by an operation that was still in flight
            self.crash()
            self._finish("the device was lost")
        models = self.plan.models
        for model in models:
            self._ask(ev.Pin(self.workload.next_id(), model, False))
            self._ask(ev.UnloadModel(self.workload.next_id(), model))
        for model in models:
            probe = {"max_tokens": 3, "temperature": 0}
            self._ask(self.workload.submit(model, "probe", self.now, tenant="probe", sampling=probe))
            insist(self.judge.last in ("stop", "length"), "baseline", f"{model} answers {self.judge.last!r} at the end")
        for model in models:
            self._ask(ev.UnloadModel(self.workload.next_id(), model))
        insist(self.core.memory_info().kv == 0, "baseline", "KV is held by nobody")
        insist(not self.state.sessions(), "baseline", "sessions stay in the journal that nobody needs")
        self._ask(ev.Halt())
        insist(self.core.halted, "baseline", "the core does not halt")
        info = self.core.memory_info()
        insist(info.free == info.total, "baseline", f"{info.free} of {info.total} bytes are free after the halt")
        insist(not self.images, "baseline", f"{len(self.images)} images stay open")
        self.state.check()
        self.judge.closed()

    def _ask(self, event: ev.Event) -> None:
        self.next.append(event)
        self._finish(str(event))

    def _finish(self, what: str) -> None:
        """Until nothing is left to be done; within a bound."""
        tokens = sum(story.image.context_length for story in self.workload.live.values())
        bound = self.steps + 500 + 20 * tokens
        self.next += [ev.Forget(story.pid) for story in self.workload.unread]
        self.workload.unread.clear()
        stuck = False
        while self.workload.live or self.flying or self.next:
            left = sorted(self.workload.live)
            insist(self.steps < bound, "livelock", f"{self.steps} steps after {what} {left} have not ended")
            idle = not self.flying and not self.next and self.core.wakeup is None
            idle = idle and not any(story.blocked for story in self.workload.live.values())
            insist(not idle or not stuck, "livelock", f"{left} wait, and nothing is in flight after {what}")
            stuck = idle
            self.chooser.turn()
            events, self.next = self.next, []
            events += [self.workload.unblock(story) for story in self.workload.live.values() if story.blocked]
            self.step(events + self._due(bool(events)))


def _broken(error: Exception) -> Violation:
    """The core raised: a broken invariant of its own, or a bug."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_frame.f_code.co_name}" if trace else ""
    kind = "check" if isinstance(error, AssertionError) else type(error).__name__
    return Violation(f"{kind} in {where}", str(error) or "assertion")
