"""The script that plants bugs in copies of the kernel: it still can, the simulator finds them, and it says if not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICK = ("missing decref", "no fence", "salt dropped", "double end", "token delivered twice")


def planted(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "tests/planted_bugs.py"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, timeout=120)


def test_every_bug_can_still_be_planted() -> None:
    done = planted("--list")
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.splitlines()) >= 30


def test_the_simulator_catches_the_quick_ones_and_the_kernel_stays_as_it_was() -> None:
    before = {file: file.read_bytes() for file in (ROOT / "kernel").glob("*.py")}
    done = planted("--steps", "5000", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(QUICK)} bugs, {len(QUICK)} caught, 0 not" in done.stdout
    assert all(name in done.stdout for name in QUICK)
    assert {file: file.read_bytes() for file in (ROOT / "kernel").glob("*.py")} == before


def test_a_bug_that_names_a_file_of_tests_is_caught_by_the_first_one_that_fails() -> None:
    done = planted("--steps", "1", "room at once goes unnoticed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "caught by test_model_faults.py: test_kv_of_one_who_is_blocked_goes_for_another_model" in done.stdout


def test_a_bug_that_is_not_caught_is_exit_code_1() -> None:
    done = planted("--steps", "1", "displaced with a batch in flight")
    assert done.returncode == 1 and "1 bugs, 0 caught, 1 not" in done.stdout


def test_a_bug_that_there_is_not_is_named() -> None:
    done = planted("no such bug")
    assert done.returncode == 1 and "'no such bug'" in done.stderr and done.stderr.count("\n") == 1
