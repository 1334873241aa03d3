"""Many seeds, over several processes if asked, and what came of them all."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from llm_os.drivers.simulation.faults import parse
from llm_os.drivers.simulation.plan import Options
from llm_os.drivers.simulation.play import Failure, Outcome, play, save
from llm_os.drivers.simulation.shrink import shrink

_WORKER = "from llm_os.drivers.simulation.simulate import work; work()"


class Report(Struct, frozen=True, kw_only=True):
    """What many runs came to. `failures` are shrunk, one of each kind; `failed` are all seeds that failed."""

    seeds: int
    steps: int
    trace: str  # hash of all traces, in the order of the seeds
    calls: dict[int, int]  # by seed: calls that could fail
    faults: dict[str, int]  # how often each was hit
    actions: dict[str, int]
    ends: dict[str, int]
    failed: list[int]
    failures: list[Failure]
    files: list[str]  # regression files, as many as failures if there is a folder


class _Job(Struct):
    seed: int
    options: Options


def simulate(
    seeds: Iterable[int],
    steps: int = 1000,
    faults: str = "all",
    *,
    jobs: int = 1,
    fail_call: int | None = None,
    regressions: Path | None = None,
    shrink_s: float = 20.0,
    progress: Callable[[Outcome], None] | None = None,
) -> Report:
    """Simulate `steps` steps for each seed, and then until everything has ended.

    `faults` is "all", "none" or names with commas; `fail_call` makes that call fail which is the n-th that can.
    `progress` is called after each run. A run that fails does not stop the others: it is shrunk, for at most `shrink_s`
    seconds for each kind of failure, and written to the folder `regressions`, if there is one.
    Raises RequestError for an unknown fault.
    """
    options = Options(steps=steps, faults=parse(faults), fail_call=fail_call)
    runs = [_Job(seed, options) for seed in seeds]
    outcomes: dict[int, Outcome] = {}
    for outcome in _outcomes(runs, jobs):
        outcomes[outcome.seed] = outcome
        if progress is not None:
            progress(outcome)
    ordered = [outcomes[run.seed] for run in runs]
    kinds: dict[str, Failure] = {}
    for outcome in ordered:
        if outcome.failure is not None:
            kinds.setdefault(outcome.failure.kind, outcome.failure)
    failures = [shrink(failure, seconds=shrink_s) for failure in kinds.values()]
    return Report(
        seeds=len(ordered),
        steps=sum(outcome.steps for outcome in ordered),
        trace=hashlib.blake2b("".join(outcome.trace for outcome in ordered).encode(), digest_size=8).hexdigest(),
        calls={outcome.seed: outcome.calls for outcome in ordered},
        faults={kind: 0 for kind in options.faults} | _sum(outcome.faults for outcome in ordered),
        actions=_sum(outcome.actions for outcome in ordered),
        ends=_sum(outcome.ends for outcome in ordered),
        failed=[outcome.seed for outcome in ordered if outcome.failure is not None],
        failures=failures,
        files=[str(save(failure, regressions)) for failure in failures] if regressions else [],
    )


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _outcomes(runs: list[_Job], jobs: int) -> Iterator[Outcome]:
    """In any order."""
    if jobs <= 1 or len(runs) <= 1:
        yield from (play(run.seed, run.options) for run in runs)
        return
    todo, lock = iter(runs), threading.Lock()
    done: list[Outcome | BaseException] = []
    ready = threading.Semaphore(0)

    def serve() -> None:
        """One process, that is given one run after the other. Not a pool: that imports the caller's script again."""
        try:
            command = [sys.executable, "-c", _WORKER]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:  # noqa: S603
                assert worker.stdin is not None and worker.stdout is not None
                while True:
                    with lock:
                        run = next(todo, None)
                    if run is None:
                        break
                    worker.stdin.write(msgspec.json.encode(run) + b"\n")
                    worker.stdin.flush()
                    done.append(msgspec.json.decode(worker.stdout.readline(), type=Outcome))
                    ready.release()
        except BaseException as error:
            done.append(error)
            ready.release()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(jobs, len(runs)))]
    for thread in threads:
        thread.start()
    for at in range(len(runs)):
        ready.acquire()
        outcome = done[at]
        if isinstance(outcome, BaseException):
            raise RuntimeError(f"a process of the simulator ended: {outcome!r}") from outcome
        yield outcome
    for thread in threads:
        thread.join()


def work() -> None:
    """A worker: runs on stdin, one a line, outcomes on stdout. Ends when nobody wants any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it is interrupted too, and closes the pipes
    with suppress(BrokenPipeError):
        for line in sys.stdin.buffer:
            run = msgspec.json.decode(line, type=_Job)
            sys.stdout.buffer.write(msgspec.json.encode(play(run.seed, run.options)) + b"\n")
            sys.stdout.buffer.flush()
