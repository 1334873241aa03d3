"""What hosts ask of the machine: bursts of requests, forks, changes of mind. Decides what comes; judges nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_os.drivers.sim import SimImage
from llm_os.drivers.simulation.chooser import Chooser
from llm_os.drivers.simulation.plan import Plan
from llm_os.drivers.simulation.story import Story
from llm_os.kernel import events as ev
from llm_os.kernel.kernel import encode
from llm_os.kernel.process import Process
from llm_os.kernel.request import Request, Sampling

_UNKNOWN = "sim:d"  # a model that nobody else uses


class Workload:
    """Draws events, and keeps the stories of the processes that they begin."""

    def __init__(self, plan: Plan, chooser: Chooser) -> None:
        self.stories: dict[int, Story] = {}
        self.live: dict[int, Story] = {}  # of them, those that have not ended
        self.images = {model: SimImage.parse(model) for model in plan.models}
        self._plan = plan
        self._chooser = chooser
        self._count = 0
        self._acts: list[Callable[[float], list[ev.Event]]] = [
            self._burst,
            self._burst,
            self._burst,
            self._burst,
            self._fork,
            self._kill,
            self._renice,
            self._load,
            self._unload,
        ]

    def next_id(self) -> int:
        """Of processes and tickets."""
        self._count += 1
        return self._count

    def events(self, now: float) -> list[ev.Event]:
        """What comes in this turn, mostly nothing."""
        if self._chooser.below(self._plan.restful) != self._plan.restful - 1:
            return []
        return self._chooser.pick(self._acts)(now)

    def submit(self, model: str, prompt: str, now: float, *, chat: bool = False, **fields: Any) -> ev.Submit:
        """A request, and its story."""
        sampling = Sampling(**fields.pop("sampling", {}))
        text: dict[str, Any] = {"messages": [{"role": "u", "content": prompt}]} if chat else {"prompt": prompt}
        request = Request(model=model, sampling=sampling, **text, **fields)
        pid, seed = self.next_id(), self._count * 7919
        self.begin(pid, request, seed, now)
        return ev.Submit(pid, request, seed)

    def begin(self, pid: int, request: Request, seed: int, now: float, parent: Story | None = None) -> Story:
        image = self.images.get(request.model) or SimImage.parse(request.model)
        story = Story(
            pid,
            request,
            seed if request.sampling.seed is None or parent else request.sampling.seed,
            Process(pid, request, 0, 0.0).salt,
            image,
            encode(ev.Encode(0, image, request)),
            parent,
            submitted=now,
        )
        self.stories[pid] = self.live[pid] = story
        return story

    def _burst(self, now: float) -> list[ev.Event]:
        return [self._submit(now) for _ in range(1 + self._chooser.below(self._plan.burst))]

    def _submit(self, now: float) -> ev.Event:
        below, pick = self._chooser.below, self._chooser.pick
        model = pick(self._plan.models)
        context = self.images[model].context_length
        kind = below(8)
        length = (1 + below(6), 1 + below(12), context // 2, context - 4)[(0, 0, 0, 1, 1, 1, 2, 3)[kind]]
        prompt = pick(self._plan.prefixes) + "".join(chr(97 + below(26)) for _ in range(2)) + "q" * length
        prompt = prompt[: context - 8]
        room = context - len(prompt) - 4
        return self.submit(
            model,
            prompt,
            now,
            chat=below(8) == 7,
            nice=(0, 0, 0, 0, 5, 19, -5, -20)[below(8)],
            tenant=pick(self._plan.tenants),
            sampling={
                "max_tokens": None if below(12) == 11 else 1 + below(max(1, min(room, (6, 24)[below(2)]))),
                "temperature": float(below(2)),
            },
        )

    def _some(self) -> Story | None:
        """A process: mostly one that lives."""
        stories = list(self.live.values())
        if not stories or self._chooser.below(10) == 9:
            return self.stories.get(1 + self._chooser.below(max(1, self._count)))
        return self._chooser.pick(stories)

    def _fork(self, now: float) -> list[ev.Event]:
        parent = self._some()
        if parent is None:
            return []
        pid = self.next_id()
        self.begin(pid, parent.request, pid * 104729, now, parent)
        return [ev.Fork(pid, parent.pid, pid * 104729)]

    def kill(self, story: Story, ticket: int | None) -> ev.Event:
        story.killed = True
        return ev.Kill(story.pid, ticket)

    def _kill(self, now: float) -> list[ev.Event]:
        story = self._some()
        return [self.kill(story, self.next_id())] if story else []

    def _renice(self, now: float) -> list[ev.Event]:
        story = self._some()
        return [ev.Renice(self.next_id(), story.pid, self._chooser.below(40) - 20)] if story else []

    def _load(self, now: float) -> list[ev.Event]:
        return [ev.LoadModel(self.next_id(), self._chooser.pick(self._plan.models))]

    def _unload(self, now: float) -> list[ev.Event]:
        return [ev.UnloadModel(self.next_id(), self._chooser.pick((*self._plan.models, _UNKNOWN)))]
