"""Each operation of a story fails, one run for each, until a run has none left to fail (as SQLite's tests do it).

Whatever fails, once or from then on: every process ends once, and said nothing wrong before; nothing hangs, nothing is
left over, and the next who comes is served.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_os.drivers.sim import Lone, SimImage
from llm_os.kernel import events as ev
from llm_os.kernel.driver import Sample
from llm_os.kernel.journal import Took, replay
from llm_os.kernel.loop import encode
from llm_os.kernel.process import salt_of
from llm_os.kernel.random import uniform

MODELS = ("sim:a?layer_bytes=65536", "sim:b?layer_bytes=65536")  # five frames each, with their workspace
FILES = (ev.Open, ev.Encode, ev.Journal, ev.SwapOut, ev.SwapIn, ev.Demote)


class Trap:
    """Fails the n-th operation, once or from then on; 0 fails none. Counts what was performed, by kind."""

    def __init__(self, at: int, stays: bool) -> None:
        self.count = 0
        self.struck: Counter[str] = Counter()
        self.performed: Counter[type] = Counter()
        self._at = at
        self._stays = stays

    def __call__(self, operation: ev.Operation) -> None:
        self.count += 1
        self.performed[type(operation)] += 1
        if self._at and (self.count >= self._at if self._stays else self.count == self._at):
            self.struck[type(operation).__name__] += 1
            if isinstance(operation, FILES):
                raise OSError(errno.ENOSPC, "no space left")
            raise MemoryError("out of memory")


class Tale:
    """One run of a story: its machine, and what each process may have said."""

    def __init__(self, machine: type[Any], trap: Trap) -> None:
        self._machine = machine
        self._trap = trap
        self.lives: list[Any] = []
        self.parents: dict[int, int] = {}
        self.gifts: dict[int, dict[int, tuple[int, ...]]] = {}  # pid -> after so many tokens of the answer -> what
        self._tickets = 1000
        self.asked: list[int] = []

    def boot(self, **config: Any) -> Any:
        m = self._machine(**{"memory": 40 * 65536, "page_tokens": 4, "batch_tokens": 8, **config})
        m.tick, m.refuse = 1e-4, self._trap
        self.lives.append(m)
        self.asked = []
        return m

    @property
    def ticket(self) -> int:
        self._tickets += 1
        self.asked.append(self._tickets)
        return self._tickets

    def fork(self, pid: int, parent: int) -> None:
        self.parents[pid] = parent
        self.lives[-1].fork(pid, parent)

    def may_say(self, pid: int, count: int) -> Iterator[list[int]]:
        """The first tokens that a reader of this process may get: of a fork, from any point of its parent's answer."""
        if pid not in self.parents:
            yield self._answer(pid, [], count)
            return
        parent = self._answer(self.parents[pid], [], 64)
        for taken in range(len(parent)):
            yield self._answer(pid, parent[:taken], count)

    def _answer(self, pid: int, inherited: list[int], count: int) -> list[int]:
        request, drawn = self.lives[-1].requests[pid]
        image, gifts = SimImage.parse(request.model), self.gifts.get(pid, {})
        prompt = encode(ev.Encode(0, image, request))
        lone, said = Lone(image, salt_of(request.tenant), [*prompt, *inherited]), list[int]()
        while len(said) < count:
            for token in gifts.get(len(inherited) + len(said), ()):
                lone.feed(token)
            temperature = request.sampling.temperature or 0.0
            said.append(lone.next(Sample(uniform=uniform(drawn, lone.fed), temperature=temperature)))
            lone.feed(said[-1])
        return said


def steps(m: Any, count: int) -> None:
    """Complete so many operations, if there are any."""
    for _ in range(count):
        if m.pending:
            m.complete()


# -- ten stories -------------------------------------------------------------------------------------------------------


def plain(tale: Tale) -> None:
    m = tale.boot()
    m.submit(1, "x" * 20, MODELS[0])
    m.submit(2, "yy", MODELS[0], sampling={"temperature": 1.0})


def shared_prefix_and_fork(tale: Tale) -> None:
    m = tale.boot()
    m.submit(1, "p" * 21, MODELS[0], sampling={"max_tokens": 12})
    steps(m, 7)
    tale.fork(2, 1)
    while m.pending and not any(isinstance(operation, ev.Copy) for operation in m.pending):
        m.complete()
    tale.fork(3, 1)
    tale.fork(4, 2)
    while any(isinstance(operation, ev.Copy) for operation in m.pending):
        m.complete()
    m.submit(5, "p" * 21 + "q", MODELS[0])


def samples_of_one_prompt(tale: Tale) -> None:
    m = tale.boot()
    m.submit(1, "s" * 18, MODELS[0], sampling={"temperature": 1.0})
    for pid in (2, 3, 4):
        m.fork(pid, 1, from_prompt=True)


def swap_out_and_in(tale: Tale) -> None:
    m = tale.boot(memory=74 * 65536, swap_host=5 * 65536, swap_disk=64 * 65536)  # worth it where weights are heavy
    m.tick = 1e-9
    for pid in range(1, 6):
        m.submit(pid, f"{pid}" * 12, "sim:heavy", sampling={"max_tokens": 12})
        block = tale.ticket
        m.post(ev.Block(block, pid, 5.0))
        while block not in m.replies:
            m.complete()
        steps(m, 1)
    m.submit(6, "6" * 12, "sim:heavy", sampling={"max_tokens": 12})
    m.settle()
    for pid in range(1, 6):
        m.post(ev.Unblock(tale.ticket, pid))


def compaction(tale: Tale) -> None:
    m = tale.boot(memory=24 * 65536, prefix_cache=False)
    for pid in range(1, 8):
        m.submit(pid, f"{pid}" * 9, MODELS[0], sampling={"max_tokens": 30})
    steps(m, 24)
    m.post(*(ev.Kill(pid) for pid in (1, 3, 5)))
    m.submit(9, "late", "sim:c?layer_bytes=393216&layers=1")


def fault_with_eviction(tale: Tale) -> None:
    m = tale.boot(memory=11 * 65536, slice_s=1e-3)
    for pid, model in ((1, 0), (2, 1), (3, 0), (4, 1)):
        m.submit(pid, f"{pid}" * 6, MODELS[model])
        steps(m, 3)


def blocked_for_a_tool(tale: Tale) -> None:
    m = tale.boot()
    m.submit(1, "b" * 10, MODELS[0])
    m.submit(2, "c" * 10, MODELS[0])
    steps(m, 7)
    block = tale.ticket
    m.post(ev.Block(block, 1, 5.0))
    while block not in m.replies:
        m.complete()
    m.submit(3, "d" * 10, MODELS[0])
    steps(m, 4)
    if m.replies[block].error is None:
        tale.gifts[1] = {len(m.tokens(1)): (65, 66, 67)}
    m.post(ev.Unblock(tale.ticket, 1, (65, 66, 67)))


def journal_and_restart(tale: Tale) -> None:
    first = tale.boot(state=Path("state"))
    first.submit(1, "j" * 10, MODELS[0], sampling={"temperature": 1.0})
    first.submit(2, "k" * 10, MODELS[1], sampling={"max_tokens": 30})
    steps(first, 20)
    second = tale.boot(state=Path("state"))
    second.journal, second.requests = list(first.journal), dict(first.requests)
    sessions = replay(second.journal)
    second.requests = {pid: request for pid, request in first.requests.items() if pid in sessions}
    second.post(*(ev.Restore(pid, session) for pid, session in sessions.items()))
    second.submit(3, "l" * 6, MODELS[0])


def unload_and_reload(tale: Tale) -> None:
    m = tale.boot()
    m.post(ev.LoadModel(tale.ticket, MODELS[0]), ev.LoadModel(tale.ticket, MODELS[1], prefetch=True))
    steps(m, 5)
    m.submit(1, "u" * 9, MODELS[0])
    m.settle()
    m.post(ev.UnloadModel(tale.ticket, MODELS[0]))
    m.submit(2, "u" * 9, MODELS[0])
    m.submit(3, "u" * 9, MODELS[1])
    m.settle()
    m.post(ev.UnloadModel(tale.ticket, MODELS[0]))
    m.settle()
    m.post(ev.LoadModel(tale.ticket, MODELS[0]))


def ends_before_the_end(tale: Tale) -> None:
    m = tale.boot()
    m.submit(1, "e" * 10, MODELS[0], sampling={"max_tokens": 40}, deadline_s=20 * m.tick)
    m.submit(2, "f" * 10, MODELS[0], sampling={"max_tokens": 40})
    m.submit(3, "g" * 10, MODELS[1], queue_s=4 * m.tick)
    m.submit(4, "h" * 10, MODELS[0])
    steps(m, 12)
    m.post(ev.Kill(2, tale.ticket))


STORIES: dict[Callable[[Tale], None], tuple[set[type], set[str]]] = {  # what it is to be about: operations, ends
    plain: ({ev.Open, ev.Encode, ev.Load, ev.Run}, {"length"}),
    shared_prefix_and_fork: ({ev.Copy}, {"length"}),
    samples_of_one_prompt: ({ev.Copy}, {"length"}),
    swap_out_and_in: ({ev.SwapOut, ev.SwapIn, ev.Demote}, {"length"}),
    compaction: ({ev.Copy}, {"length", "cancelled"}),
    fault_with_eviction: ({ev.Unload}, {"length"}),
    blocked_for_a_tool: ({ev.Run}, {"length"}),
    journal_and_restart: ({ev.Journal}, {"length"}),
    unload_and_reload: ({ev.Unload, ev.Release, ev.Prefetch}, {"length"}),
    ends_before_the_end: ({ev.Run}, {"length", "cancelled", "deadline", "Refused"}),
}


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_whatever_fails_everybody_ends_and_nothing_is_left(
    machine: type[Any], story: Callable[[Tale], None], stays: bool
) -> None:
    operations, ends = STORIES[story]
    sound = Trap(0, stays)
    assert run(machine, story, sound) == ends and operations <= {*sound.performed}
    for at in range(1, 1000):
        trap = Trap(at, stays)
        try:
            run(machine, story, trap)
        except Exception as error:
            error.add_note(f"operation {at} failed: {dict(trap.struck)}")
            raise
        if not trap.struck:
            return
    raise AssertionError("there is always one more operation")


def run(machine: type[Any], story: Callable[[Tale], None], trap: Trap) -> set[str]:
    """How its processes ended."""
    tale = Tale(machine, trap)
    story(tale)
    m = tale.lives[-1]
    m.settle()
    performed = dict(trap.performed)
    ends = {m.end(pid) for pid in m.requests}
    for pid in m.requests:
        said = m.tokens(pid)
        assert any(said == right for right in tale.may_say(pid, len(said))), f"process {pid} said {said}"
        before = tale.lives[0].tokens(pid)
        assert m.end(pid) != "length" or said[: len(before)] == before, "what was delivered is kept"
    left_over(tale, m, trap)
    trap.performed = Counter(performed)
    return ends


def left_over(tale: Tale, m: Any, trap: Trap) -> None:
    """Nothing is; and it goes on."""
    m.refuse = lambda operation: None
    assert not m.core.processes and not m.pending and m.core.memory_info().kv == 0
    assert {*tale.asked} == {*m.replies}, "who asked has an answer"
    assert len(m.swapped) == sum(page.slot is not None for page in m.core.pager.cache)
    done = list(m.requests)
    for pid, model in ((901, MODELS[0]), (902, MODELS[1])):
        m.post(*(ev.UnloadModel(pid * 10 + n, model) for n, model in enumerate(MODELS)))
        m.settle()
        m.submit(pid, "next", model)
        m.settle()
        assert m.end(pid) == "length" and m.tokens(pid) == m.expected(pid), "the next who comes is served"
    m.post(*(ev.Forget(pid) for pid in (*done, 901, 902)))
    m.settle()
    assert not replay(m.journal), "a session is kept that nobody needs"
    assert all(isinstance(record, Took) is False or record.tokens for record in m.journal)
    m.post(ev.Halt())
    m.settle()
    info = m.core.memory_info()
    assert m.core.halted and info.free == info.total and not info.host + info.disk and not m.swapped
    assert m.opened_images == m.closed_images
