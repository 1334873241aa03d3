"""What a plugin costs that is installed and does nothing: microseconds of all threads' time, per step and plugin.

    python tests/benchmarks/hooks.py [PLUGINS]

A kernel on the sim driver decodes with no plugin, with plugins that implement no hook, and with plugins whose events do
nothing; interleaved, medians.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from time import process_time

import llm_os

LIMIT_US = 5.0
ROUNDS, STREAMS, ANSWER, REPEATS = 5, 8, 200, 5
EVENTS = """
import llm_os

@llm_os.hookimpl
def step_finished(step): return None

@llm_os.hookimpl
def process_exited(process): return None
"""


def install(folder: Path, name: str, source: str) -> None:
    package, info = folder / name, folder / f"{name}-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(source)
    hooks = ["step_finished", "process_exited"]
    (package / "llm_os.toml").write_text(f'[{name}]\nsummary = ""\ncontract = {llm_os.CONTRACT}\nhooks = {hooks}\n')
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[llm_os]\n{name} = {name}\n")


def step_cost(plugins: tuple[str, ...]) -> float:
    """Microseconds of processor time per step."""
    config = llm_os.Config(driver="sim", memory="256MiB", frame_size="64KiB", plugins=plugins)
    sampling = llm_os.Sampling(max_tokens=ANSWER, temperature=0)
    request = llm_os.Request(model="sim:a?end_after=0", prompt="x" * 20, sampling=sampling)

    def answer() -> None:
        for stream in [kernel.stream(request) for _ in range(STREAMS)]:
            stream.result()

    with llm_os.Kernel(config) as kernel:
        answer()
        began = process_time()
        for _ in range(REPEATS):
            answer()
        return (process_time() - began) / (REPEATS * ANSWER) * 1e6


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    kinds: dict[str, tuple[str, ...]] = {"no plugin": ()}
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for kind, source in (("no hook", ""), ("events", EVENTS)):
            names = tuple(f"bench_{kind.replace(' ', '_')}_{index}" for index in range(count))
            for name in names:
                install(Path(folder), name, source)
            kinds[kind] = names
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(ROUNDS):
            for kind, plugins in kinds.items():
                times[kind].append(step_cost(plugins))
    base = statistics.median(times["no plugin"])
    print(f"a step of {STREAMS} processes without plugins: {base:.0f} us of processor time")
    costs = {kind: (statistics.median(times[kind]) - base) / count for kind in ("no hook", "events")}
    for kind, each in costs.items():
        print(f"each installed plugin that does nothing ({kind}): {each:+.2f} us a step")
    if max(costs.values()) > LIMIT_US:
        sys.exit(f"the aim is {LIMIT_US} us")


if __name__ == "__main__":
    main()
