"""What hosts ask of the machine: bursts of requests, forks, tools, changes of mind. Decides only, judges nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from llm_os.drivers.sim import SimImage
from llm_os.drivers.simulation.chooser import Chooser
from llm_os.drivers.simulation.plan import UNIT, Plan
from llm_os.drivers.simulation.story import Story
from llm_os.kernel import events as ev
from llm_os.kernel.loop import encode
from llm_os.kernel.process import Process
from llm_os.kernel.request import Request, Sampling

_STEADY = 80  # turns, between two changes of a backlog
_UNKNOWN = "sim:nobody"


class Workload:
    """Draws events, and keeps the stories of the processes that they begin."""

    def __init__(self, plan: Plan, chooser: Chooser) -> None:
        self.stories: dict[int, Story] = {}
        self.live: dict[int, Story] = {}  # of them, those that have not ended
        self.blocks: dict[int, Story] = {}  # tickets of Block
        self.gifts: dict[int, Story] = {}  # tickets of Unblock
        self.unread: list[Story] = []  # ended; their readers are slow to say that they have it all
        self.images = {model: SimImage.parse(model) for model in plan.models}
        self.now = 0.0
        self._plan = plan
        self._chooser = chooser
        self._count = 0
        self._away = (
            {*plan.tenants[1:]} if plan.backlog and chooser.below(2) else set[str]()
        )  # who asks for nothing now
        self._lengths: dict[str, tuple[int, int]] = {}  # of a tenant's prompts and answers
        acts: list[tuple[int, Callable[[float], list[ev.Event]]]] = [
            (12, self._burst),
            (3, self._fork),
            (2, self._samples),
            (3, self._kill),
            (2, self._renice),
            (2, self._load),
            (2, self._unload),
            (1, self._pin),
            (16 if plan.crowded else 4, self._block),
            (16 if plan.crowded else 6, self._unblock),
            (3, self._read),
            (4, self._branch),
            (4, self._again),
        ]
        self._acts = [act for weight, act in acts for _ in range(weight)]

    def changed(self, model: str, image: SimImage) -> None:
        """This is the model now: who is here has not begun with another one in this life."""
        if image.name != self.images[model].name:
            self.images[model] = image
            for story in self.live.values():
                if story.request.model == model:
                    story.image, story.lone = image, None

    def next_id(self) -> int:
        """Of processes and tickets."""
        self._count += 1
        return self._count

    def stirs(self) -> bool:
        """Whether something comes in this turn; mostly nothing does."""
        if self._plan.backlog:
            return bool(self._short()) or self._chooser.below(_STEADY) == _STEADY - 1
        return self._chooser.below(self._plan.rest) == self._plan.rest - 1

    def events(self, now: float) -> list[ev.Event]:
        """What comes."""
        self.now = now
        if self._plan.backlog:
            return self._steady(now)
        return self._chooser.pick(self._acts)(now)

    def submit(self, model: str, prompt: str, now: float, *, chat: bool = False, **fields: Any) -> ev.Submit:
        """A request, and its story."""
        sampling = Sampling(**fields.pop("sampling", {}))
        text: dict[str, Any] = {"messages": [{"role": "u", "content": prompt}]} if chat else {"prompt": prompt}
        request = Request(model=model, sampling=sampling, **text, **fields)
        pid = self.next_id()
        self._begin(pid, request, pid * 7919, now)
        return ev.Submit(pid, request, pid * 7919)

    def _begin(self, pid: int, request: Request, seed: int, now: float) -> Story:
        image = self.images.get(request.model) or SimImage.parse(request.model)
        salt = Process(pid, request, 0, 0.0).salt
        story = Story(pid, request, seed, salt, image, encode(ev.Encode(0, image, request)))
        story.progress = now
        if request.deadline_s is not None:
            story.deadline = now + request.deadline_s
        queue_s = self._plan.config.queue_s if request.queue_s is None else request.queue_s
        if queue_s is not None:
            story.patience = now + queue_s
        self.stories[pid] = self.live[pid] = story
        return story

    # -- processes -----------------------------------------------------------------------------------------------------

    def _burst(self, now: float) -> list[ev.Event]:
        return [self._submit(now) for _ in range(1 + self._chooser.below(self._plan.burst))]

    def _submit(self, now: float) -> ev.Event:
        below, pick = self._chooser.below, self._chooser.pick
        model = pick(self._plan.models)
        context = self.images[model].context_length
        lengths = (0, 2, 2, 1, 2, 1, 2, 3) if self._plan.crowded else (0, 0, 0, 1, 1, 1, 2, 3)
        length = (1 + below(6), 1 + below(12), context // 2, context)[lengths[below(8)]]
        prompt = pick(self._plan.prefixes) + "".join(chr(97 + below(26)) for _ in range(2)) + "q" * length
        prompt = prompt[: context - 8]
        room = context - len(prompt) - 4
        hurried, kind = below(16), below(8)
        return self.submit(
            model,
            prompt,
            now,
            chat=kind == 7,
            hold=kind > 4,
            nice=(0, 0, 0, 0, 5, 19, -5, -20)[below(8)],
            tenant=pick(self._plan.tenants),
            deadline_s=(1 + below(200)) * 4 * UNIT if hurried == 15 else None,
            queue_s=(1 + below(200)) * 2 * UNIT if hurried == 14 else None,
            sampling={
                "max_tokens": None if below(12) == 11 else 1 + below(max(1, min(room, (6, 24)[below(2)]))),
                "temperature": float(below(2)),
            },
        )

    # -- a backlog -----------------------------------------------------------------------------------------------------

    def _short(self) -> list[str]:
        """Tenants that are here and have too few requests waiting."""
        waiting = Counter(story.request.tenant for story in self.live.values() if not story.ran_first)
        enough = self._plan.config.batch_size + self._plan.backlog
        return [tenant for tenant in self._plan.tenants if tenant not in self._away and waiting[tenant] < enough]

    def _steady(self, now: float) -> list[ev.Event]:
        """More of what each tenant always asks; or a tenant goes or comes back, or changes its mind about a request."""
        if short := self._short():
            return [self._usual(tenant, now) for tenant in short]
        if self._chooser.below(4) == 3:
            return self._kill(now) + self._read(now)
        self._away = set() if self._away else {self._chooser.pick(self._plan.tenants)}
        return self._read(now)

    def _usual(self, tenant: str, now: float) -> ev.Event:
        """Of one tenant all requests have about the same lengths."""
        below, at = self._chooser.below, self._plan.tenants.index(tenant)
        if tenant not in self._lengths:
            self._lengths[tenant] = self._chooser.pick(((1, 8), (7, 1), (4, 4)))
        prompt, answer = self._lengths[tenant]
        text = "ijk"[at] * below(prompt) + chr(97 + below(26))
        sampling = {"max_tokens": 1 + below(answer), "temperature": 0.0}
        return self.submit(self._plan.models[0], text, now, tenant=tenant, sampling=sampling)

    def _again(self, now: float) -> list[ev.Event]:
        """What somebody has asked before."""
        story = self._some()
        if story is None:
            return []
        pid = self.next_id()
        request = replace(story.request)
        self._begin(pid, request, pid * 7919, now)
        return [ev.Submit(pid, request, pid * 7919)]

    def _some(self) -> Story | None:
        """A process: mostly one that lives."""
        stories = list(self.live.values())
        if not stories or self._chooser.below(10) == 9:
            return self.stories.get(1 + self._chooser.below(max(1, self._count)))
        return self._chooser.pick(stories)

    def _fork(self, now: float) -> list[ev.Event]:
        return self._spawn(now, 1, False)

    def _branch(self, now: float) -> list[ev.Event]:
        """Some ways on from the midst of an answer: they share the page that is written next."""
        parents = [story for story in self.live.values() if story.ran_first and not story.blocked]
        return self._spawn(now, 1 + self._chooser.below(3), False, self._chooser.pick(parents)) if parents else []

    def _samples(self, now: float) -> list[ev.Event]:
        """More answers to the same prompt."""
        return self._spawn(now, 1 + self._chooser.below(3), True)

    def _spawn(self, now: float, count: int, from_prompt: bool, parent: Story | None = None) -> list[ev.Event]:
        parent = parent or self._some()
        if parent is None:
            return []
        events: list[ev.Event] = []
        for _ in range(count):
            pid = self.next_id()
            story = self._begin(pid, parent.request, pid * 104729, now)
            story.forked = True
            if not from_prompt:
                story.parent = parent
            events.append(ev.Fork(pid, parent.pid, pid * 104729, from_prompt))
        return events

    def kill(self, story: Story, ticket: int | None) -> ev.Event:
        story.killed = True
        return ev.Kill(story.pid, ticket)

    def _kill(self, now: float) -> list[ev.Event]:
        story = self._some()
        return [self.kill(story, self.next_id())] if story else []

    def _renice(self, now: float) -> list[ev.Event]:
        story = self._some()
        return [ev.Renice(self.next_id(), story.pid, self._chooser.below(40) - 20)] if story else []

    def _block(self, now: float) -> list[ev.Event]:
        story = self._some()
        if story is None or story in self.blocks.values():
            return []
        if story.lives > 1 and story in self.gifts.values():  # it comes back from the journal, and its tool has said it
            return []
        ticket = self.next_id()
        self.blocks[ticket] = story
        expected = (None, UNIT, 50 * UNIT, 5000 * UNIT)[self._chooser.below(4)]
        return [ev.Block(ticket, story.pid, expected)]

    def _unblock(self, now: float) -> list[ev.Event]:
        waiting = [story for story in self.live.values() if story.blocked and not story.killed]
        if not waiting:
            return []
        story = self._chooser.pick(waiting)
        length = self._chooser.below(6)
        if story.request.hold and length == 5:
            return [ev.Finish(self.next_id(), story.pid)]
        said = tuple(97 + self._chooser.below(26) for _ in range(length))
        return [self.unblock(story, said if story.parent is None else ())]  # a fork that never ran: of unknown length

    def unblock(self, story: Story, said: tuple[int, ...] = ()) -> ev.Event:
        ticket = self.next_id()
        self.blocks = {asked: other for asked, other in self.blocks.items() if other is not story}  # it comes too late
        self.gifts[ticket] = story
        story.offer(said)
        story.progress = self.now
        if story.ready is not None:
            story.ready = self.now
        return ev.Unblock(ticket, story.pid, said)

    def _read(self, now: float) -> list[ev.Event]:
        return [ev.Forget(self.unread.pop(0).pid)] if self.unread else []

    # -- models --------------------------------------------------------------------------------------------------------

    def _load(self, now: float) -> list[ev.Event]:
        below = self._chooser.below
        model = self._chooser.pick(self._plan.models)
        return [ev.LoadModel(self.next_id(), model, prefetch=below(3) == 2, pin=below(8) == 7)]

    def _unload(self, now: float) -> list[ev.Event]:
        return [ev.UnloadModel(self.next_id(), self._chooser.pick((*self._plan.models, _UNKNOWN)))]

    def _pin(self, now: float) -> list[ev.Event]:
        return [ev.Pin(self.next_id(), self._chooser.pick(self._plan.models), self._chooser.below(3) == 0)]
