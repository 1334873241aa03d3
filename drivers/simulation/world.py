"""A real core in a world of virtual time, where every operation takes as long as it likes and anything may break.

    turn: what comes, what completes ──events──> core.step ──actions──> judged, then on their way
                        ^                                                     │
                        └── due, in any order, also after an abort <──────────┘

Everything that is decided goes through the chooser; every step is judged. Raises Violation.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from heapq import heappop, heappush
from typing import Any

from llm_os.drivers.simulation import host
from llm_os.drivers.simulation.chooser import Chooser
from llm_os.drivers.simulation.device import Device
from llm_os.drivers.simulation.faults import Faults
from llm_os.drivers.simulation.fences import Fences
from llm_os.drivers.simulation.judge import Judge
from llm_os.drivers.simulation.plan import Options, draw
from llm_os.drivers.simulation.violation import Violation, insist
from llm_os.drivers.simulation.workload import Workload
from llm_os.kernel import events as ev
from llm_os.kernel.core import Core

UNIT = 0.001  # seconds; the shortest operation takes one
_SLOWEST = {"run": 30, "load": 200, "unload": 30, "copy": 15, "open": 60, "encode": 15, "swap": 40, "journal": 15}
_HANG = 60_000
_PLACES = {ev.Run: "run", ev.Load: "load", ev.Unload: "unload", ev.Release: "unload", ev.Copy: "copy"}
_PLACES |= {ev.Open: "open", ev.Encode: "encode", ev.Prefetch: "load", ev.Journal: "journal"}
_PLACES |= {ev.SwapOut: "swap", ev.SwapIn: "swap", ev.Demote: "swap"}


class World:
    """One run. `run()` plays it; the counters say what happened."""

    def __init__(self, options: Options, chooser: Chooser, *, tell: bool = False) -> None:
        self.story: list[str] = []  # in words, if `tell`
        self._tell = tell
        self.options = options
        self.chooser = chooser
        self.faults = Faults(chooser, options.faults, options.fail_call)
        self.plan = draw(chooser)
        self.workload = Workload(self.plan, chooser)
        self.judge = Judge(self.plan, self.workload)
        self.now = 0.0
        self.steps = 0
        self.actions: Counter[str] = Counter()
        self.trace = hashlib.blake2b(digest_size=8)
        self.boot()

    def boot(self) -> None:
        """A new core on a new device."""
        config = self.plan.config
        self.core = Core(config, config.budget(0))
        self.device = Device(config)
        self.device.chooser = self.chooser
        self.fences = Fences(config, self.core.memory.frames)
        self.flying: list[tuple[int, int, ev.Operation, str | None]] = []  # heap: when, which, what, what goes wrong
        self.images: list[Any] = []  # open
        self.clock = int(self.now / UNIT)

    # -- turns -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while self.steps < self.options.steps:
            self.turn()
        self.faults.stop()
        self.settle()

    def turn(self) -> None:
        self.chooser.turn()
        events = self.workload.events(self.now) + self._mischief()
        self.step(events + self._due(bool(events)))

    def _due(self, busy: bool) -> list[ev.Event]:
        """What completes now. Time goes on to the next completion, or to when the core wants to be called."""
        wakeup = getattr(self.core, "wakeup", None)
        if not self.flying:
            if not busy:
                self.clock = max(self.clock + 1, -int(-wakeup // UNIT)) if wakeup is not None else self.clock + 10
            return []
        if busy and self.chooser.below(2) == 0:
            return []
        if wakeup is not None and wakeup < self.flying[0][0] * UNIT:
            self.clock = max(self.clock + 1, -int(-wakeup // UNIT))
            return []
        self.clock = max(self.clock, self.flying[0][0])
        events: list[ev.Event] = []
        while self.flying and self.flying[0][0] <= self.clock:
            _, _, operation, fault = heappop(self.flying)
            events.append(self._complete(operation, fault))
        return events

    def step(self, events: list[ev.Event]) -> None:
        """One step of the core, judged; then its actions."""
        self.steps += 1
        self.now = self.clock * UNIT
        if self._tell:
            self.story += [f"{self.steps} at {self.now:.3f} <- {event}"[:400] for event in events]
        try:
            actions = self.core.step(self.now, events)
            self.core.check()
        except Exception as error:
            raise _broken(error) from error
        if self._tell:
            self.story += [f"{self.steps} -> {action}"[:400] for action in actions]
        last = len(actions)
        crash = self.faults.at("step") == "crash" if self.faults.can("crash") else False
        if crash:
            last = self.chooser.below(last + 1)
        for action in actions[:last]:
            self.act(action)
        self.judge.stepped(self.steps, self.now)
        self._trace(events, actions)
        if crash:
            self.crash()

    def act(self, action: ev.Action) -> None:
        self.actions[type(action).__name__] += 1
        match action:
            case ev.Deliver():
                self.judge.deliver(action, self.now)
            case ev.Reply():
                self.judge.reply(action)
            case ev.Close(image):
                insist(any(image is each for each in self.images), "close", "an image that is not open")
                self.images = [each for each in self.images if each is not image]
            case ev.Discard():
                raise NotImplementedError
            case _:
                self._start(action)

    def _start(self, operation: ev.Operation) -> None:
        self.fences.start(operation)
        if isinstance(operation, ev.Run):
            self.judge.run(operation)
        place = _PLACES[type(operation)]
        fault = self.faults.call(place)
        took = 1 + self.chooser.delay(_SLOWEST[place])
        if fault in ("hang", "plugin_hang"):
            took += _HANG
        heappush(self.flying, (self.clock + took, operation.id, operation, fault))

    def _complete(self, operation: ev.Operation, fault: str | None) -> ev.Completed:
        """The operation takes place, at the last moment at which it can."""
        if fault == "device_lost":
            self.device.lost = True
            self.judge.excuse_all("device_lost")
        try:
            result = self._perform(operation, fault)
        except Exception as error:
            self.fences.end(operation, failed=True)
            self.judge.failed(operation, fault or str(error))
            return ev.Completed(operation.id, error=error)
        self.fences.end(operation, failed=False)
        if isinstance(operation, ev.Run):
            self.judge.ran(operation, result, fault)
        return ev.Completed(operation.id, result)

    def _perform(self, operation: ev.Operation, fault: str | None) -> Any:
        match operation:
            case ev.Open():
                config = self.plan.config
                opened = host.open_image(operation, self.device, config.batch_tokens, fault, self.chooser)
                if opened.image is not operation.image:
                    self.images.append(opened.image)
                self.judge.opened(operation.model, opened.image)
                return opened
            case ev.Encode():
                tokens = host.tokens_of(operation, fault, self.chooser)
                if fault == "plugin_type":
                    self.judge.mistold(operation, tokens)
                return tokens
        return self.device.perform(operation, fault)

    # -- what goes wrong between two steps -----------------------------------------------------------------------------

    def _mischief(self) -> list[ev.Event]:
        fault = self.faults.at("turn")
        live = list(self.workload.live.values())
        if fault is None or (not live and fault != "bit_flip"):
            return []
        self.faults.hit[fault] -= 1
        events: list[ev.Event] = []
        match fault:
            case "bit_flip":
                if not self.device.flip():
                    return []
            case "disconnect":
                story = self.chooser.pick(live)
                story.gone = True
                events = [self.workload.kill(story, None)]
            case "double_cancel":
                story = self.chooser.pick(live)
                events = [self.workload.kill(story, self.workload.next_id()) for _ in range(2)]
            case "duplicate_id":
                story = self.chooser.pick(live)
                events = [ev.Submit(story.pid, story.request, story.seed + 1)]
        self.faults.hit[fault] += 1
        return events

    def crash(self) -> None:
        """The program dies: what is not on the disk is gone."""
        self.judge.crashed()
        self.boot()

    # -- the end -------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """No more faults: everything ends, and all is as it was."""
        if self.device.lost:
            self.crash()
        bound = self.steps + 3000
        while self.workload.live or self.flying:
            insist(self.steps < bound, "livelock", f"after {bound} steps {sorted(self.workload.live)} have not ended")
            self.chooser.turn()
            self.step(self._due(False))
        for model in self.plan.models:
            self._ask(ev.UnloadModel(self.workload.next_id(), model))
        for model in self.plan.models:
            submit = self.workload.submit(model, "probe", self.now, sampling={"max_tokens": 3, "temperature": 0})
            self._ask(submit)
            ended = self.judge.last
            insist(ended in ("stop", "length"), "baseline", f"{model} answers {ended!r} after all faults")
            self._ask(ev.UnloadModel(self.workload.next_id(), model))
        info = self.core.residency.memory_info()
        insist(info.kv == 0, "baseline", f"{info.kv} bytes of KV are held by nobody")
        self._ask(ev.Halt())
        insist(self.core.halted, "baseline", "the core does not halt")
        info = self.core.residency.memory_info()
        insist(info.free == info.total, "baseline", f"{info.free} of {info.total} bytes are free after the halt")
        insist(not self.images, "baseline", f"{len(self.images)} images stay open")
        self.judge.closed()

    def _ask(self, event: ev.Event) -> None:
        """One event, and all that comes of it."""
        self.step([event])
        bound = self.steps + 1000
        while self.flying:
            insist(self.steps < bound, "livelock", f"{event} has not ended after {bound} steps")
            self.chooser.turn()
            self.step(self._due(False))

    def _trace(self, events: list[ev.Event], actions: list[ev.Action]) -> None:
        digest: list[Any] = [self.clock, len(events)]
        for action in actions:
            match action:
                case ev.Run(id, batch):
                    digest.append(
                        (id, batch.model, [(r.pid, r.position, len(r.tokens), r.pages) for r in batch.sequences])
                    )
                case ev.Deliver(pid, chunk):
                    digest.append((pid, chunk.token_ids if chunk else None, action.completion is None))
                case _:
                    digest.append((type(action).__name__, getattr(action, "id", 0)))
        self.trace.update(repr(digest).encode())


def _broken(error: Exception) -> Violation:
    """The core raised: a broken invariant of its own, or a bug."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_frame.f_code.co_name}" if trace else ""
    kind = "check" if isinstance(error, AssertionError) else type(error).__name__
    return Violation(f"{kind} in {where}", str(error) or "assertion")
