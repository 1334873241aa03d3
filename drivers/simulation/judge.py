"""Compares what readers get with what they should get, and says who is to blame for an error. Sees actions only.

An end with an error needs an excuse: a fault that struck an operation of this process, of its model, or of the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from llm_os.drivers.sim import SimImage
from llm_os.drivers.simulation.host import TamperedImage
from llm_os.drivers.simulation.pace import Pace
from llm_os.drivers.simulation.pins import Pins
from llm_os.drivers.simulation.plan import Plan
from llm_os.drivers.simulation.refusals import check_refusal
from llm_os.drivers.simulation.shares import Shares
from llm_os.drivers.simulation.story import Story
from llm_os.drivers.simulation.violation import insist
from llm_os.drivers.simulation.workload import Workload
from llm_os.kernel import events as ev
from llm_os.kernel.driver import RowError
from llm_os.kernel.errors import Closed, Error, Refused, RequestError, StoreError
from llm_os.kernel.journal import Session, Took

CLASSES = 40  # of nice; who has waited for so many steps of aging is before all who came later


class Judge:
    """The readers of all processes, and whoever waits for a ticket."""

    def __init__(self, plan: Plan, workload: Workload) -> None:
        self.ends: Counter[str] = Counter()
        self.last: object = None  # how the last process ended
        self.lost_s = 0.0  # that faults took: nobody is to blame for them
        self._hangs: list[tuple[float, float]] = []  # until when, for how long
        self._plan = plan
        self._workload = workload
        self._tampered: set[str] = set()  # models whose image is a broken plugin's
        self._lost = False
        self._failing: set[str] = set()  # models whose operation failed in this step
        self._tickets: set[int] = set()  # that wait for a reply
        self.pins = Pins()
        self._shares = Shares(plan)
        self._pace = Pace()
        self._stuck = False  # the device has failed to unload a model
        self._most_live = 0  # that can have been live in this step
        self._durable: Counter[int] = Counter()  # tokens of answers that are in the journal
        self._charges: list[tuple[Story, int]] = []  # of this step
        self._charged: Counter[int] = Counter()  # tokens of processes, computed or generated
        self._spent: Counter[str] = Counter()  # the same, of tenants

    def story(self, pid: int) -> Story:
        story = self._workload.stories.get(pid)
        insist(story is not None, "process", f"{pid} was never asked for")
        assert story is not None
        return story

    def asked(self, events: list[ev.Event]) -> None:
        """The core is told this."""
        self._most_live = len(self._workload.live)
        if any(not isinstance(event, ev.Completed) for event in events):
            self._pace.asked()
        for event in events:
            if (self._failing or self._tampered) and isinstance(event, ev.Submit | ev.Fork | ev.Restore):
                story = self.story(event.pid)
                if story.request.model in self._failing | self._tampered:
                    story.excused = story.excused or "its model failed as it came"
            self.pins.asked(event)
        self._tickets.update(ticket for event in events if (ticket := getattr(event, "ticket", None)) is not None)

    # -- the device ----------------------------------------------------------------------------------------------------

    def run(self, operation: ev.Run, now: float, waiting: Collection[int]) -> None:
        """A batch is issued. `waiting` are the processes that the core has and has not admitted to the running set."""
        new: list[Story] = []
        for rows in operation.batch.sequences:
            story = self.story(rows.pid)
            insist(story.request.model == operation.batch.model, "model", f"process {rows.pid} runs on another model")
            if not story.ran_first:
                new.append(story)
            story.feed(rows, now)
            self._shares.fed(story, rows)
            self._pace.fed(rows, self._workload.live.values())
        for story in new:
            self._check_order(story, waiting)

    def ran(self, operation: ev.Run, result: Any, fault: str | None, now: float) -> None:
        sequences = operation.batch.sequences
        if fault == "wrong_rows":
            self.failed(operation, fault)
            return
        for rows, row in zip(sequences, result, strict=True):
            story = self._workload.stories[rows.pid]
            said = int(rows.sample is not None)
            if isinstance(row, RowError):
                story.excused = story.excused or row.message
            elif rows.sample is not None:
                said = max(1, story.ran(rows, row, now))
                self._shares.answered(story, said)
            if now < story.deadline:
                self._charges.append((story, rows.position + len(rows.tokens) + said))

    def failed(self, operation: ev.Operation, why: str, ready: Collection[str] = ()) -> None:
        """Whom this operation's failure may end. `ready` are the models on the device: others may have waited for pages
        to move out of the way."""
        live = self._workload.live.values()
        self._pace.failed(operation)
        self._stuck |= isinstance(operation, ev.Unload)
        match operation:
            case ev.Run(_, batch):
                struck = [self._workload.stories[rows.pid] for rows in batch.sequences]
            case ev.Encode():
                struck = [story for story in live if story.request is operation.request]
            case ev.Copy(_, model):
                struck = [s for s in live if s.request.model == model or s.request.model not in ready]
            case ev.Open() | ev.Load() | ev.Unload() | ev.Release():
                struck = [story for story in live if story.request.model == operation.model]
            case ev.Journal(_, records):
                pids = {record.pid for record in records}
                struck = [story for story in live if story.pid in pids]
            case _:
                struck = []
        self._failing.add(getattr(operation, "model", ""))
        if isinstance(operation, ev.Copy):
            self._failing.update({*self._plan.models} - {*ready})
        self.pins.failed(operation, ready)
        for story in struck:
            story.excused = story.excused or why

    def succeeded(self, operation: ev.Operation) -> None:
        self._pace.succeeded(operation)

    def swapped_in(self, operation: ev.Operation, good: tuple[bool, ...], now: float) -> None:
        """Pages that did not come back: whoever was to run with them may have to wait for room once more."""
        if isinstance(operation, ev.SwapIn) and not all(good):
            for story in self._workload.live.values():
                if story.request.model == operation.model and story.ready is not None:
                    story.ready = now

    def encoded(self, operation: ev.Encode, now: float) -> None:
        for story in self._workload.live.values():
            if story.request is operation.request and not story.forked:
                story.ready = now

    def mistold(self, operation: ev.Encode, tokens: Any) -> None:
        """A broken plugin gave these for tokens. If the core takes them, they are the prompt."""
        self.failed(operation, "plugin_type")
        for story in self._workload.live.values():
            if story.request is operation.request and isinstance(tokens, list | tuple | bytes):
                story.prompt, story.context = list(tokens), list(tokens)

    def opened(self, model: str, image: object) -> None:
        if isinstance(image, TamperedImage):
            self._tampered.add(model)
            self.pins.failed(ev.Open(0, model), ())
            for story in self._workload.live.values():
                if story.request.model == model:
                    story.excused = story.excused or "plugin_type"
        else:
            self._tampered.discard(model)
            if isinstance(image, SimImage):
                self._workload.changed(model, image)

    def written(self, operation: ev.Journal) -> None:
        for record in operation.records:
            if isinstance(record, Took):
                self._durable[record.pid] += len(record.tokens)

    def lost(self) -> None:
        """The device is gone: until the next life everything may fail."""
        self._lost = True

    # -- the readers ---------------------------------------------------------------------------------------------------

    def deliver(self, item: ev.Deliver, now: float) -> None:
        story = self.story(item.pid)
        if item.chunk is not None:
            story.read(item.chunk.token_ids, item.chunk.text)
            if item.chunk.waiting:
                story.wait()
            if self._plan.config.state is not None:
                durable = self._durable[item.pid]
                insist(story.delivered <= durable, "durable", f"{item.pid}: {story.delivered} of {durable} tokens")
        if item.completion is not None:
            story.finish(item.completion, now)
            self._end(story, item.completion.finish_reason, item.completion.finish_reason)
        elif item.error is not None:
            insist(story.ended is None, "one end", f"process {item.pid} ends twice")
            story.ended = name = type(item.error).__name__
            self._blame(story, item.error, now)
            self._end(story, "rejected" if name == "Refused" else f"error {name}", item.error)
        else:
            insist(item.chunk is not None and item.chunk.finish_reason is None, "chunk", item)

    def reply(self, item: ev.Reply) -> None:
        insist(item.ticket in self._tickets, "reply", f"ticket {item.ticket} is answered twice")
        self._tickets.remove(item.ticket)
        self.pins.replied(item)
        if (story := self._workload.blocks.pop(item.ticket, None)) is not None and item.error is None:
            story.blocked = True
        if (story := self._workload.gifts.pop(item.ticket, None)) is not None and story.gift is not None:
            if item.error is None or isinstance(
                item.error, StoreError
            ):  # that ends it, though a fork may have taken it
                story.take_gift()
            else:
                story.gift, story.blocked = None, story.ended is None

    def _end(self, story: Story, reason: str, how: object) -> None:
        del self._workload.live[story.pid]
        self._shares.ended(story)
        self._pace.asked()
        self.ends[reason] += 1
        self.last = how
        self._workload.unread.append(story)

    def _blame(self, story: Story, error: Exception, now: float) -> None:
        insist(isinstance(error, Error) and "\n" not in str(error), "error", repr(error))
        model = story.request.model
        self.pins.refused(model, error)
        if isinstance(error, Refused) and not (story.excused or self._lost or model in self._failing):
            fixed = self.pins.ever or self._stuck
            check_refusal(self._plan, story, str(error), live=self._most_live - 1, fixed=fixed, now=now)
        if isinstance(error, Refused | Closed) or story.excused or self._lost:
            return
        if model in self._failing:
            return
        forked = story.forked and isinstance(error, RequestError)
        insist(forked, "blame", f"{story.pid} ended with {error!r} and no fault had struck it")

    # -- bounds --------------------------------------------------------------------------------------------------------

    def _check_order(self, story: Story, waiting: Collection[int]) -> None:
        """It runs for the first time. Nobody of its model and tenant who came long before it still waits for that."""
        if story.ready is None:
            return
        before = story.ready - (CLASSES + 1) * self._plan.config.aging_s
        for other in self._workload.live.values():
            if other.ready is None or other.ready >= before or other.pid >= story.pid or other.ran_first:
                continue
            alike = (other.request.model, other.request.tenant) == (story.request.model, story.request.tenant)
            lost = sum(seconds for end, seconds in self._hangs if end >= other.ready)
            if other.ready >= before - lost:
                continue
            if alike and other.pid in waiting and not (other.killed or other.excused or other.blocked):
                insist(False, "starvation", f"{story.pid} runs before {other.pid}, which waits since {other.ready}")

    def _charge(self, story: Story, tokens: int) -> None:
        """It has so many tokens now. Those whose process has ended by then are nobody's."""
        if story.ended is not None or story.killed or story.excused or self._lost:
            return
        tenant, more = story.request.tenant, max(0, tokens - self._charged[story.pid])
        self._charged[story.pid] += more
        self._spent[tenant] += more
        limits, spent = self._plan.config.tenants.get(tenant), self._spent[tenant]
        if limits is not None and limits.max_tokens is not None:
            insist(spent <= limits.max_tokens, "quota", f"{tenant} was served {spent} tokens of {limits.max_tokens}")

    def stepped(self, now: float, processes: int) -> None:
        """After every step. `processes` is how many the core has that came in this life."""
        self._failing.clear()
        for story, tokens in self._charges:
            self._charge(story, tokens)
        self._charges.clear()
        self._shares.stepped(self._workload.live.values())
        insist(processes <= self._plan.config.queue_limit, "queue", f"{processes} processes live")

    def hangs(self, now: float, seconds: float) -> None:
        """A fault makes an operation that begins now take so much longer."""
        self.lost_s += seconds
        self._hangs.append((now + seconds, seconds))

    def stuck(self, now: float, bound_s: float) -> Story | None:
        """Who has waited for a token for longer than that, faults apart."""
        waiting = (story for story in self._workload.live.values() if not story.blocked and not story.killed)
        return next((story for story in waiting if now - story.progress > bound_s + self.lost_s), None)

    # -- lives ---------------------------------------------------------------------------------------------------------

    def crashed(self, sessions: dict[int, Session], now: float) -> list[ev.Event]:
        """The program died, and these sessions are in the journal. What the next life begins with."""
        journaled = self._plan.config.state is not None
        for story in list(self._workload.live.values()):
            ending = story.killed or story.excused or story.request.deadline_s is not None
            kept = story.pid in sessions or not journaled or ending or story.delivered <= story.inherited
            insist(kept, "durable", f"{story.pid} is gone, and {story.delivered} tokens were delivered")
            story.ended = "crash"
            self._end(story, "crash", "crash")
        self._workload.unread.clear()
        self._workload.blocks.clear()
        self._workload.gifts.clear()
        self._lost = False
        self._tampered.clear()
        self._tickets.clear()
        self.pins, self._shares, self._pace = Pins(), Shares(self._plan), Pace()
        self._stuck = False
        self._durable.clear()
        self._charges.clear()
        self._charged.clear()
        self._spent.clear()
        for pid, session in sessions.items():
            story = self.story(pid)
            story.revive(session, now)
            story.image = self._workload.images.get(story.request.model, story.image)
            self._durable[pid] = len(story.answer)
            self._workload.live[pid] = story
        return [ev.Restore(pid, session) for pid, session in sessions.items()]

    def closed(self) -> None:
        """At the end nobody waits any more."""
        insist(not self._tickets, "reply", f"tickets {sorted(self._tickets)} were never answered")
