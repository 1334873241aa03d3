"""How much time and memory the kernel itself takes. No tensors: the driver answers at once, and is not counted.

    python tests/benchmarks/kernel.py [SEEDS]

Prints simulated steps per second with all checks, the mean time of a step of the core with few and with many live
processes (`schedule` of all, `admit` and `plan` within it, and the whole step), and the bytes of the kernel's tables
per page.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tracemalloc
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import llm_os
from llm_os.drivers.sim import SimImage
from llm_os.kernel import events as ev
from llm_os.kernel.config import Config
from llm_os.kernel.core import Core
from llm_os.kernel.driver import Footprint, Row, Sampled
from llm_os.kernel.page_table import PageTable
from llm_os.kernel.prefix_cache import PrefixCache, page_key, root_key
from llm_os.kernel.request import Request, Sampling
from llm_os.kernel.slab import Page, Slab

MODEL = "sim:a"
PROMPT, ANSWER = 200, 100


class Bench:
    """A core with a constant number of live processes, whose operations complete at once."""

    def __init__(self, live: int, batch_size: int) -> None:
        config = Config(driver="sim", memory="64GiB", batch_size=batch_size, queue_limit=live, batch_tokens=1024)
        self.core = Core(config, config.budget(0))
        self.now, self.pid = 0.0, 0
        self.times: dict[str, list[float]] = {"schedule": [], "admit": [], "plan": [], "step": []}
        self._last: dict[str, float] = {}
        self._time(self.core, "schedule")
        self._time(self.core.scheduler, "admit")
        self._time(self.core.scheduler, "plan")
        self.next: list[ev.Event] = [self._submit() for _ in range(live)]

    def _time(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args)
            finally:
                self._last[name] = self._last.get(name, 0.0) + perf_counter() - start

        setattr(owner, name, timed)

    def _submit(self) -> ev.Submit:
        self.pid += 1
        tokens = [self.pid % 251, self.pid // 251, *range(PROMPT - 2)]  # no prompt begins like another
        sampling = Sampling(max_tokens=ANSWER + self.pid % 50, temperature=0)
        return ev.Submit(self.pid, Request(model=MODEL, prompt=tokens, sampling=sampling, tenant=f"{self.pid % 4}"), 0)

    def step(self) -> bool:
        """One step. True if it started a batch."""
        self.now += 0.01
        self._last.clear()
        events, self.next = self.next, []
        start = perf_counter()
        actions = self.core.step(self.now, events)
        self._last["step"] = perf_counter() - start
        ran = False
        for action in actions:
            match action:
                case ev.Open():
                    footprint = Footprint(
                        extents=(1 << 20,) * 4, kv_bytes_per_token=1 << 12, workspace=1 << 20, page_tokens=(16,)
                    )
                    self.next.append(ev.Completed(action.id, ev.Opened(SimImage.parse(MODEL), footprint)))
                case ev.Encode():
                    self.next.append(ev.Completed(action.id, list(action.request.prompt or ())))
                case ev.Run():
                    ran = True
                    rows: tuple[Row, ...] = tuple(Sampled(97) if s.sample else None for s in action.batch.sequences)
                    self.next.append(ev.Completed(action.id, rows))
                case ev.Deliver():
                    if action.completion or action.error:
                        self.next.append(self._submit())
                case ev.Load() | ev.Copy():
                    self.next.append(ev.Completed(action.id))
        return ran

    def measure(self, steps: int) -> dict[str, float]:
        """Mean milliseconds of each part of a step that started a batch, without the slowest in a hundred: those are
        the machine's. A median would hide admissions where not every step has one."""
        for _ in range(100 + 2 * len(self.next)):
            self.step()
        gc.collect()
        gc.disable()
        while len(self.times["step"]) < steps:
            if self.step():
                for name, times in self.times.items():
                    times.append(self._last.get(name, 0.0))
        gc.enable()
        usual = steps * 99 // 100
        return {name: 1000 * statistics.fmean(sorted(times)[:usual]) for name, times in self.times.items()}


def simulated_steps(seeds: int) -> None:
    start = process_time()
    report = llm_os.simulate(range(1, seeds + 1), 1000, shrink_s=0.0)
    seconds = process_time() - start
    print(f"simulator   {report.steps:,} steps in {seconds:.1f} s of one core: {report.steps / seconds:,.0f} a second")


def step_times() -> None:
    print("live   batch   admit ms   plan ms   schedule ms   step ms   step/row us")
    for live, batch_size in ((16, 16), (128, 64), (1024, 128)):
        bench = Bench(live, batch_size)
        ms = bench.measure(1000)
        row = 1000 * ms["step"] / min(live, batch_size)
        print(
            f"{live:4}   {batch_size:5}   {ms['admit']:8.3f}   {ms['plan']:7.3f}   {ms['schedule']:11.3f}   "
            f"{ms['step']:7.3f}   {row:11.2f}"
        )


def table_bytes(pages: int = 10_000) -> None:
    """Pages, where they are, who maps them, and their names in the prefix cache."""
    config = Config(driver="sim", memory="64GiB")
    core = Core(config, config.budget(0))
    slab = Slab(core.memory, MODEL, 16, 1 << 16)
    core.memory.open_slab(slab)
    gc.collect()
    tracemalloc.start()
    table, cache, key = PageTable(slab), PrefixCache(), root_key(MODEL, "")
    for _ in range(pages):
        page = Page(slab)
        table.add(page)
        slab.place(page)
    placed = tracemalloc.get_traced_memory()[0]
    for number, page in enumerate(table.pages):
        key = page_key(key, [number])
        table.keys.append(key)
        cache.insert(key, page)
    listed = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    print(
        f"tables      {placed * 1000 // pages:,} bytes per 1,000 pages; "
        f"{listed * 1000 // pages:,} with their names in the prefix cache"
    )


if __name__ == "__main__":
    step_times()
    table_bytes()
    simulated_steps(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
