"""`llm-os sim` from outside: what it prints, its exit codes, its regression files."""

from __future__ import annotations

import json

import pytest

WRONG = {
    "unknown fault": (("--faults", "gremlins"), ("'gremlins'", "device_lost", "none")),
    "no fault": (("--faults", ","), ("no kind of fault is named", "all")),
    "seeds that are none": (("--seeds", "many"), ("'many'", "A..B")),
    "seeds backwards": (("--seeds", "9..1"), ("'9..1'", "A..B")),
    "no steps": (("--steps", "0"), ("--steps is 0",)),
    "no jobs": (("--jobs", "0"), ("--jobs is 0",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_gets_one_line_that_names_it(run, case):
    arguments, named = WRONG[case]
    done = run("sim", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("llm-os: ") and done.stderr.count("\n") == 1
    for text in named:
        assert text in done.stderr


def test_a_run_without_a_failure_prints_its_histogram_and_nothing_else(run):
    done = run("sim", "--seeds", "1..3", "--steps", "100", "--faults", "double_cancel,crash")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("3 seeds, ")
    for name in ("double_cancel", "crash", "Deliver", "length", "trace"):
        assert name in done.stdout


def test_a_report_is_one_json_object(run):
    done = run("sim", "--seeds", "4", "--steps", "100", "--faults", "none", "--json")
    report = json.loads(done.stdout)
    assert report["seeds"] == 1 and report["failed"] == [] and report["actions"]["Run"] > 0


def test_a_file_that_is_no_regression_gets_one_line(run, tmp_path):
    file = tmp_path / "none.json"
    done = run("sim", "--replay", str(file))
    assert done.returncode == 1 and "none.json" in done.stderr and done.stderr.count("\n") == 1
    file.write_text("{}")
    done = run("sim", "--replay", str(file))
    assert done.returncode == 1 and "none.json" in done.stderr and done.stderr.count("\n") == 1


BROKEN = """
import sys
from llm_os.kernel.page_table import PageTable
PageTable.shared = lambda self, position: None
from llm_os.shell import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_failure_is_exit_code_1_and_a_file_that_shows_it_again(run, environment, tmp_path):
    import subprocess
    import sys

    def broken(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", BROKEN, "sim", *arguments], env=environment, capture_output=True, text=True
        )

    folder = tmp_path / "found"
    done = broken("--seeds", "1..20", "--steps", "300", "--faults", "none", "--regressions", str(folder))
    assert done.returncode == 1
    file = next(folder.iterdir())
    assert str(file) in done.stderr and "seed" in done.stderr
    again = broken("--replay", str(file))
    assert again.returncode == 1 and "shared page" in again.stderr and "->" in again.stdout
    fixed = run("sim", "--replay", str(file))
    assert fixed.returncode == 0 and "no longer fails" in fixed.stderr
