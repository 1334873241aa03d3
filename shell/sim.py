"""`llm-os sim`: the kernel in a simulated world, with faults. What it found to stdout, how far it is to stderr."""

from __future__ import annotations

import json as json_text
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import llm_os
from llm_os.shell.options import FLAG
from llm_os.shell.progress import Line
from llm_os.shell.stdio import printable, say

_STORY = 40  # lines


def sim(
    *,
    seeds: str = "1..20",
    steps: int = 1000,
    faults: str = "all",
    jobs: int = 1,
    replay: Path | None = None,
    regressions: Path = Path("regressions"),
    json: Annotated[bool, FLAG] = False,
) -> int:
    """Run the kernel in a simulated world with faults, and check every step.

    Parameters
    ----------
    seeds
        From A to B, as A..B, or one.
    steps
        For each seed, and then until everything has ended.
    faults
        all, none, or kinds with commas between them.
    jobs
        Processes that share the seeds.
    replay
        Play the regression file of an earlier failure again, and nothing else.
    regressions
        The folder for the regression files of failures.
    json
        Print one JSON object.
    """
    if replay is not None:
        return _replay(replay, json)
    wanted = _seeds(seeds)
    for name, value, most in (("--steps", steps, 10**9), ("--jobs", jobs, 1024)):
        if not 1 <= value <= most:
            raise llm_os.RequestError(f"{name} is {value}; it must be from 1 to {most}")
    line = Line()
    try:
        progress = _progress(line, len(wanted))
        report = llm_os.simulate(wanted, steps, faults, jobs=jobs, regressions=regressions, progress=progress)
    finally:
        line.clear()
    if json:
        print(json_text.dumps(_plain(report)))
    else:
        _show(report, faults)
    for failure, file in zip(report.failures, report.files, strict=True):
        say(f"llm-os: {failure.message}")
        say(f"llm-os: seed {failure.seed}, --steps {steps} --faults {faults}; again with: llm-os sim --replay {file}")
    return 1 if report.failed else 0


def _replay(file: Path, json: bool) -> int:
    failure = llm_os.replay(file).failure
    if json:
        print(json_text.dumps({"file": str(file), "failure": _plain(failure) if failure else None}))
    elif failure:
        for line in failure.story[-_STORY:]:
            print(printable(line))
    say(f"llm-os: {failure.message if failure else f'{file} no longer fails'}")
    return 1 if failure else 0


def _seeds(text: str) -> range:
    match = re.fullmatch(r"(\d{1,18})(?:\.\.(\d{1,18}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < first + 10**7:
        raise llm_os.RequestError(f"--seeds is {text!r}; write A..B, such as 1..300, with at most {10**7} seeds")
    return range(first, last + 1)


def _progress(line: Line, count: int) -> Callable[[Any], None]:
    done = steps = failed = 0

    def progress(outcome: Any) -> None:
        nonlocal done, steps, failed
        done, steps, failed = done + 1, steps + outcome.steps, failed + (outcome.failure is not None)
        line.show(f"{done} of {count} seeds, {steps:,} steps, {failed} failed")

    return progress


def _show(report: llm_os.Report, faults: str) -> None:
    print(f"{report.seeds} seeds, {report.steps:,} steps, faults {faults}, {len(report.failed)} failed")
    print(f"trace {report.trace}\n")
    columns = (("FAULT", report.faults), ("ACTION", report.actions), ("END", report.ends))
    tables = [[title, *(f"{name:<22}{count:>9,}" for name, count in counts.items())] for title, counts in columns]
    for row in range(max(map(len, tables))):
        print("   ".join(table[row].ljust(31) if row < len(table) else " " * 31 for table in tables).rstrip())


def _plain(value: Any) -> Any:
    """Structs as dicts, for JSON."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if fields := getattr(value, "__struct_fields__", None):
        return {name: _plain(getattr(value, name)) for name in fields}
    return value
