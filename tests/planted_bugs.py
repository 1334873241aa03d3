"""Plants one bug at a time in a copy of the kernel and lets the simulator find it: who guards the guards.

    planted_bugs.toml ──bug──> private copy of the package ──> simulator, seed after seed, until it reports a violation
                                                           └─> or a file of tests, for a bug that names one as `test`

What only a long run with a backlog shows is for such a file; all else is for the simulator. A bug counts as caught if
the same run, or the same tests, find nothing in the kernel as it is. Exits with 1 if a bug is not caught
within the steps, or if its `old` text no longer stands exactly once in kernel/. The working tree is never changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FAULTS = ("all", "none", "all", "swap_flip,hang,crash")  # seed after seed, in turns
STEPS = 400  # of one seed, before the faults stop
HANG_S = 900  # for a run of the simulator that does not come back

# In a process of its own: plays seeds from the first on, until one fails or the steps are used up.
PLAYER = """
import json, sys
from pathlib import Path
import llm_os.kernel
from llm_os.drivers.simulation.faults import parse
from llm_os.drivers.simulation.plan import Options
from llm_os.drivers.simulation.play import play
folder, seed, last, budget, steps, faults = json.loads(sys.argv[1])
assert Path(llm_os.kernel.__file__).resolve().is_relative_to(folder), "another kernel is being simulated"
used, failure = 0, None
while failure is None and used < budget and seed <= last:
    chosen = faults[seed % len(faults)]
    outcome = play(seed, Options(steps=steps, faults=parse(chosen)))
    used += outcome.steps
    if outcome.failure is not None:
        failure = {"seed": seed, "faults": chosen, "kind": outcome.failure.kind, "message": outcome.failure.message}
    seed += 1
print(json.dumps({"used": used, "failure": failure}))
"""

# In a process of its own: a file of tests, until the first one fails.
TESTER = """
import sys
from pathlib import Path
import pytest
import llm_os.kernel
folder, root, file = sys.argv[1:]
assert Path(llm_os.kernel.__file__).resolve().is_relative_to(folder), "another kernel is being tested"
options = ["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "--rootdir", root, "-c", f"{root}/pyproject.toml"]
sys.exit(pytest.main([*options, f"{root}/{file}"]))
"""
FAILED = re.compile(r"^(?:FAILED|ERROR) \S*?::(\w+)", re.MULTILINE)


class Bug(NamedTuple):
    """One change of one file."""

    name: str
    breaks: str
    old: str
    new: str
    test: str | None = None  # the file of tests that has to find it, in place of the simulator


class Verdict(NamedTuple):
    """What came of a bug. `by` is the promise that the simulator found broken, or the test that failed; None if nothing
    was found."""

    bug: Bug
    file: str
    by: str | None
    steps: int
    seed: int = 0
    faults: str = ""
    message: str = ""


def bugs(names: list[str]) -> list[Bug]:
    """All, or those that are named."""
    every = [Bug(**entry) for entry in tomllib.loads((ROOT / "tests/planted_bugs.toml").read_text())["bug"]]
    unknown = sorted({*names} - {bug.name for bug in every})
    if unknown:
        sys.exit(f"planted_bugs: there is no bug {unknown[0]!r}; --list names those there are")
    return [bug for bug in every if not names or bug.name in names]


def home(bug: Bug) -> Path | None:
    """The file of kernel/ in which its old text stands; None if that is not exactly once."""
    found = [(file, count) for file in (ROOT / "kernel").glob("*.py") if (count := file.read_text().count(bug.old))]
    return found[0][0] if len(found) == 1 and found[0][1] == 1 else None


def plant(folder: Path, bug: Bug | None) -> Path:
    """A copy of the package in `folder`, with the bug."""
    shutil.copytree(ROOT / "llm_os", folder / "llm_os", ignore=shutil.ignore_patterns("__pycache__"))
    if bug is not None:
        file = home(bug)
        assert file is not None
        (folder / "llm_os/kernel" / file.name).write_text(file.read_text().replace(bug.old, bug.new))
    return folder


def run(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With the copy of the package that is in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S, cwd=folder)


def simulate(folder: Path, seed: int, last: int, budget: int) -> dict[str, Any]:
    """Steps used, and the first failure."""
    done = run(folder, PLAYER, json.dumps([str(folder), seed, last, budget, STEPS, FAULTS]))
    if done.returncode:
        raise RuntimeError(f"the simulator itself fails: {done.stderr.strip().splitlines()[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@cache
def fails_anyway(sound: Path, seed: int) -> bool:
    """Whether the simulator finds fault with the kernel as it is."""
    return simulate(sound, seed, seed, 1)["failure"] is not None


def failing(folder: Path, file: str) -> str | None:
    """The first test of a file that fails; None if all pass."""
    done = run(folder, TESTER, str(folder), str(ROOT), file)
    found = FAILED.search(done.stdout)
    if done.returncode == 1 and found is not None:
        return found[1]
    if done.returncode:
        raise RuntimeError(f"{file} cannot be run: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return None


@cache
def sound_fails(sound: Path, file: str) -> str | None:
    """The test that fails with the kernel as it is."""
    return failing(sound, file)


def examine(bug: Bug, file: Path, test: str, sound: Path) -> Verdict:
    """Let a file of tests look for the bug."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        try:
            if anyway := sound_fails(sound, test):
                return Verdict(bug, file.name, None, 0, message=f"{anyway} fails anyway")
            name = failing(plant(Path(folder).resolve(), bug), test)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return Verdict(bug, file.name, None, 0, message=str(error))
    if name is None:
        return Verdict(bug, file.name, None, 0, message=f"not caught by {test}")
    return Verdict(bug, file.name, f"caught by {Path(test).name}: {name}", 0)


def judge(bug: Bug, sound: Path, budget: int) -> Verdict:
    """Let the simulator look for the bug. `sound` is a copy without any."""
    file = home(bug)
    if file is None:
        return Verdict(bug, "?", None, 0, message="its old text does not stand exactly once in kernel/")
    if bug.test is not None:
        return examine(bug, file, bug.test, sound)
    used, seed = 0, 1
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = plant(Path(folder).resolve(), bug)
        while used < budget:
            try:
                outcome = simulate(copy, seed, sys.maxsize, budget - used)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                return Verdict(bug, file.name, None, used, message=str(error))
            used += outcome["used"]
            failure = outcome["failure"]
            if failure is not None and not fails_anyway(sound, failure["seed"]):
                kind, message = failure["kind"], failure["message"]
                return Verdict(bug, file.name, kind, used, failure["seed"], failure["faults"], message)
            seed = failure["seed"] + 1 if failure is not None else seed
    return Verdict(bug, file.name, None, used, message="not caught")


def table(verdicts: Iterator[Verdict]) -> list[Verdict]:
    """Print them as they come. Returns those that were not caught."""
    print(f"{'BUG':<34}{'ROOM':<18}{'CAUGHT BY':<38}{'STEPS':>8}{'SEED':>6}  FAULTS")
    missed = []
    for verdict in verdicts:
        by = verdict.by or "-"
        print(
            f"{verdict.bug.name:<34}{verdict.file:<18}{by:<38}{verdict.steps:>8,}{verdict.seed or '-':>6}  "
            f"{verdict.faults or verdict.message}",
            flush=True,
        )
        if verdict.by is None:
            missed.append(verdict)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description="Plants bugs in copies of the kernel; the simulator must find each.")
    parser.add_argument("names", nargs="*", help="bugs; all if none is named")
    parser.add_argument("--steps", type=int, default=200_000, help="within which a bug must be caught")
    parser.add_argument("--sound", action="store_true", help="first see that the kernel as it is passes")
    parser.add_argument("--list", action="store_true", help="only look whether each bug can still be planted")
    options = parser.parse_args()
    chosen = bugs(options.names)
    if options.list:
        lost = [bug for bug in chosen if home(bug) is None]
        for bug in chosen:
            print(f"{bug.name:<34}{bug.breaks}{'  <- CANNOT BE PLANTED' if bug in lost else ''}")
        return 1 if lost else 0
    with tempfile.TemporaryDirectory(prefix="planted-none-") as folder:
        sound = plant(Path(folder).resolve(), None)
        if options.sound and (failure := simulate(sound, 1, sys.maxsize, options.steps)["failure"]) is not None:
            print(f"the kernel as it is fails, at seed {failure['seed']} ({failure['faults']}): {failure['message']}")
            return 1
        missed = table(judge(bug, sound, options.steps) for bug in chosen)
    print(f"\n{len(chosen)} bugs, {len(chosen) - len(missed)} caught, {len(missed)} not")
    for verdict in missed:
        print(f"  {verdict.bug.name}: {verdict.bug.breaks} ({verdict.message})")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
