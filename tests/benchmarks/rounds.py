"""Does memory come back? Fifty rounds of load, generate, unload in one process, in each surrounding of a host.

    python tests/benchmarks/rounds.py [MODEL] [ROUNDS]

Prints the anonymous memory of this process after the first round, the highest and the last one after it, in MB.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path

import anyio

import llm_os

CONFIG = llm_os.Config(driver="cpu", memory="2GiB")


def resident_mb() -> float:
    """Physical memory that is this process's own, as the kernel of the machine counts it page by page."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1]) / 1024


async def rounds(model: str, count: int, fresh: bool) -> AsyncIterator[float]:
    """One kernel for all rounds, or a fresh one for each."""
    request = llm_os.Request(model=model, prompt="The capital of France is", sampling=llm_os.Sampling(max_tokens=4))

    async def one(kernel: llm_os.Kernel) -> None:
        await kernel.load(model)
        await kernel.generate(request)
        await kernel.unload(model)

    if fresh:
        for _ in range(count):
            async with llm_os.Kernel(CONFIG) as kernel:
                await one(kernel)
            yield resident_mb()
    else:
        async with llm_os.Kernel(CONFIG) as kernel:
            for _ in range(count):
                await one(kernel)
                yield resident_mb()


async def measure(name: str, model: str, count: int, fresh: bool) -> None:
    sizes = [size async for size in rounds(model, count, fresh)]
    first, last, top = sizes[0], sizes[-1], max(sizes)
    kernels = "a kernel each" if fresh else "one kernel"
    print(
        f"{name:14} {kernels:14} first {first:7.1f}  highest {top:7.1f} ({top / first - 1:+.2%})  "
        f"last {last:7.1f} ({last / first - 1:+.2%})",
        flush=True,
    )


def in_worker_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def in_running_loop(work: Coroutine[object, object, None]) -> None:
    """As in a notebook: the loop runs already, and each cell is a task of it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    asyncio.run_coroutine_threadsafe(work, loop).result()
    loop.call_soon_threadsafe(loop.stop)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    for fresh in (False, True):
        in_worker_thread(partial(anyio.run, measure, "worker thread", model, count, fresh))
        in_running_loop(measure("running loop", model, count, fresh))
        anyio.run(measure, "trio", model, count, fresh, backend="trio")


if __name__ == "__main__":
    main()
