"""This project and its peers on the same file, the same prompts and the same processor: `make bench`.

    .venv/bin/python tests/benchmarks/peers [OPTIONS]

docs/benchmarks.md says what is measured and how. Peers live in environments of their own, made on first use; a peer
that cannot be had, or fails at something, is reported and does not stop the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import Bench, Plan
from environments import PEERS
from fidelity import fidelity
from measures import decodes, loads, prefills, repeated, starts
from mixed import mixed
from report import plot, show, write
from rich.console import Console

import llm_os

MODEL = "smollm2:135m"
SECTIONS = {
    "start": starts,
    "load": loads,
    "prefill": prefills,
    "decode": decodes,
    "repeated": repeated,
    "mixed": mixed,
    "fidelity": fidelity,
}
_CALM = 0.1  # of the processor, taken by others: more than this spoils figures


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 150)
    began, busy = time.time(), _busy()
    store = llm_os.Store()
    store.pull(MODEL)
    stored = next(each for each in store.list() if each.name == MODEL)
    threads = options.threads or len(os.sched_getaffinity(0))
    plan = Plan(rounds=options.rounds or 3, threads=threads)
    if options.quick:
        plan = Plan(
            rounds=options.rounds or 1,
            threads=threads,
            batches=(1, 8),
            contexts=(128,),
            prefills=(128, 512),
            mixed_s=4.0,
            mixed_probes=2,
            positions=320,
        )
    peers = [peer for peer in PEERS if peer.name in options.peers]
    with Bench(plan, peers, stored.path, stored.sha256, options.out, console) as bench:
        try:
            for name in options.only:
                SECTIONS[name](bench)
                write(bench.results, plan, options.out, began, busy)
        except KeyboardInterrupt:
            bench.results.miss(f"the rest of {name}, and what comes after", "all", "interrupted")
        found = write(bench.results, plan, options.out, began, busy)
        with bench.doing("draw the plot"):
            picture = plot(found, bench.results)
    if busy > _CALM:
        console.print(f"[yellow]others took {busy:.0%} of the processor when this began: trust no figure of it[/]")
    show(bench.results, console)
    files = ", ".join(str(file) for file in (found, picture) if file is not None)
    console.print(f"{time.time() - began:.0f} s; {files}", highlight=False)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/benchmarks/peers", description=(__doc__ or "").split("\n")[0])
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", type=_some_of(names), default=names, help=f"some of {','.join(names)}; '' is none")
    sections = list(SECTIONS)
    parser.add_argument("--only", type=_some_of(sections), default=sections, help=f"some of {','.join(sections)}")
    parser.add_argument("--rounds", type=int, help="samples of each measure [3]")
    parser.add_argument("--threads", type=int, help="of every engine [all cores]")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of results [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a minute or two: few sizes, one round")
    return parser.parse_args()


def _some_of(names: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name} is none of {','.join(names)}")
        return chosen

    return parse


def _busy() -> float:
    """The share of the processor that others take, over a second."""

    def ticks() -> tuple[int, int]:
        fields = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    total, idle = ticks()
    time.sleep(1)
    later, still_idle = ticks()
    return 1 - (still_idle - idle) / (later - total)


if __name__ == "__main__":
    sys.exit(main())
