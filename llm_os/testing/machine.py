"""The kernel's core on the sim driver, with time and completions in the test's hands: no thread, no clock, no sleep.

    machine = Machine(memory="8MiB", policy="mine", plugins=("mine",))
    machine.submit(1, "a prompt", tenant="a")
    machine.settle()
    assert machine.tokens(1) == machine.expected(1)

Filters, tools and events are not of the core: test those with a whole kernel (the fixture `llm_os_kernel`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from llm_os.drivers.sim import SimDriver, SimImage, reference
from llm_os.kernel import events as ev
from llm_os.kernel.config import Config
from llm_os.kernel.core import Core
from llm_os.kernel.drafter import Drafter
from llm_os.kernel.driver import Sample
from llm_os.kernel.loop import encode
from llm_os.kernel.plugins import Plugins
from llm_os.kernel.policy import Fair, Policy
from llm_os.kernel.process import salt_of
from llm_os.kernel.random import uniform
from llm_os.kernel.request import Request, Sampling


class Machine:
    """A core whose operations happen when the test says so, in any order, and as late as that."""

    tick = 1.0  # seconds a step

    def __init__(self, policy: str | Policy = "fair", drafters: Sequence[Drafter] = (), **config: Any) -> None:
        """`config` are fields of Config; `policy` a registered one's name, or one that no plugin has registered."""
        named = policy if isinstance(policy, str) else "fair"
        self.config = Config(**{"driver": "sim", "memory": "64MiB", "frame_size": "64KiB", "policy": named, **config})
        if isinstance(policy, str):
            policy = Fair() if policy == "fair" else Plugins(self.config).open_policy()
        self.core = Core(self.config, self.config.budget(0), policy, drafters=drafters)
        self.driver = SimDriver(self.config)
        self.now = 0.0
        self.pending: list[ev.Operation] = []
        self.deliveries: dict[int, list[ev.Deliver]] = defaultdict(list)
        self.replies: dict[int, ev.Reply] = {}
        self.opened_images = self.closed_images = 0
        self.swapped: dict[int, bytes] = {}
        self.journal: list[Any] = []
        self.requests: dict[int, tuple[Request, int]] = {}
        self.runs: list[ev.Run] = []
        self.mangle: Callable[[ev.Operation, Any], Any] = lambda operation, result: result
        self.refuse: Callable[[ev.Operation], None] = lambda operation: None

    def post(self, *events: ev.Event) -> None:
        """One step with these events; its actions are sorted into what they are."""
        self.now += self.tick
        for action in self.core.step(self.now, events):
            match action:
                case ev.Deliver(pid):
                    self.deliveries[pid].append(action)
                case ev.Reply(ticket):
                    assert ticket not in self.replies
                    self.replies[ticket] = action
                case ev.Close():
                    self.closed_images += 1
                case ev.Discard(slots):
                    for slot in slots:
                        del self.swapped[slot]
                case _:
                    self.pending.append(action)
                    if isinstance(action, ev.Run):
                        self.runs.append(action)
        self.core.check()

    def submit(self, pid: int, prompt: str = "hello", model: str = "sim:a", **fields: Any) -> None:
        sampling = Sampling(**{"max_tokens": 8, "temperature": 0, **fields.pop("sampling", {})})
        request = Request(model=model, prompt=prompt, sampling=sampling, **fields)
        self.requests[pid] = (request, 1000 + pid)
        self.post(ev.Submit(pid, request, 1000 + pid))

    def fork(self, pid: int, parent: int, from_prompt: bool = False) -> None:
        self.requests[pid] = (self.requests[parent][0], 1000 + pid)
        self.post(ev.Fork(pid, parent, 1000 + pid, from_prompt))

    def complete(self, index: int = 0) -> None:
        """Perform one pending operation now, and tell the core. `refuse` may fail it before it begins, and `mangle`
        spoil what came of it."""
        operation = self.pending.pop(index)
        try:
            self.refuse(operation)
            result = self.mangle(operation, self._perform(operation))
        except Exception as error:
            self.post(ev.Completed(operation.id, error=error))
        else:
            self.post(ev.Completed(operation.id, result))

    def settle(self) -> None:
        """Complete operations in order, and let time pass, until nothing is in flight and nothing waits for time."""
        for _ in range(10_000):
            if self.pending:
                self.complete()
            elif self.core.wakeup is not None:
                self.now = max(self.now, self.core.wakeup - self.tick)
                self.post()
            else:
                return
        raise AssertionError("it never comes to rest")

    def until(self, kind: type) -> None:
        """Complete operations until one of `kind` is the next."""
        while not isinstance(self.pending[0], kind):
            self.complete()

    def tokens(self, pid: int) -> list[int]:
        return [token for item in self.deliveries[pid] if item.chunk for token in item.chunk.token_ids]

    def text(self, pid: int) -> str:
        return "".join(item.chunk.text for item in self.deliveries[pid] if item.chunk)

    def end(self, pid: int) -> str:
        """Why the process ended; it has ended exactly once."""
        ends = [item for item in self.deliveries[pid] if item.completion or item.error]
        assert len(ends) == 1 and ends[0] is self.deliveries[pid][-1], f"{pid} ended {len(ends)} times"
        return ends[0].completion.finish_reason if ends[0].completion else type(ends[0].error).__name__

    def error(self, pid: int) -> str:
        return str(self.deliveries[pid][-1].error)

    def expected(self, pid: int) -> list[int]:
        """What a lone process would have answered; after the tokens that a fork took over from its parent."""
        request, drawn = self.requests[pid]
        sampling, image = request.sampling, SimImage.parse(request.model)
        prompt = encode(ev.Encode(0, image, request))
        completion = self.deliveries[pid][-1].completion
        inherited = (
            list(completion.token_ids)[: len(completion.token_ids) - len(self.tokens(pid))] if completion else []
        )
        start = len(prompt) + len(inherited)
        samples = (
            Sample(uniform=uniform(drawn, position), temperature=sampling.temperature or 0)
            for position in range(start, len(prompt) + (sampling.max_tokens or 10**6))
        )
        return list(reference(image, salt_of(request.tenant), prompt + inherited, samples))

    def _perform(self, operation: ev.Operation) -> Any:
        future: Future[Any]
        match operation:
            case ev.Open(_, model, last):
                image = last if last is not None and last.fresh() else SimImage.parse(model)
                self.opened_images += image is not last
                return ev.Opened(image, self.driver.footprint(image, self.config.batch_tokens))
            case ev.Encode():
                return encode(operation)
            case ev.Load(_, model, image, placement):
                future = self.driver.load(model, image, placement)
            case ev.Unload(_, model):
                future = self.driver.unload(model)
            case ev.Release(_, model):
                future = self.driver.release(model)
            case ev.Prefetch(_, model, image):
                future = self.driver.prefetch(model, image)
            case ev.SwapOut(_, model, pages, slots):
                contents = self.driver.swap_out(model, pages).result(0)
                self.swapped.update(zip(slots, contents, strict=True))
                return None
            case ev.SwapIn(_, model, slots, pages):
                self.driver.swap_in(model, pages, tuple(self.swapped[slot] for slot in slots)).result(0)
                return (True,) * len(slots)
            case ev.Demote():
                return None
            case ev.Journal(_, records):
                self.journal += records
                return None
            case ev.Run(_, batch):
                future = self.driver.run(batch)
            case ev.Copy(_, model, moves):
                future = self.driver.copy(model, moves)
        return future.result(0)
