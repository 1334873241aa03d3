"""The simulator as a whole: a seed is a run, faults strike, planted bugs are caught and can be seen again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

import llm_os
from llm_os.drivers.simulation.faults import FAULTS
from llm_os.drivers.simulation.plan import Options
from llm_os.drivers.simulation.play import play, replay, save
from llm_os.drivers.simulation.shrink import shrink
from llm_os.drivers.simulation.simulate import simulate
from llm_os.kernel import events as ev
from llm_os.kernel import pager, prefix_cache
from llm_os.kernel.page_table import PageTable
from llm_os.kernel.processes import Processes
from llm_os.kernel.scheduler import Scheduler

REGRESSIONS = sorted((Path(__file__).parent / "regressions").glob("*.json"))


def test_a_kernel_without_faults_breaks_no_promise():
    report = simulate(range(1, 21), 400, "none", shrink_s=5)
    assert not report.failures, report.failures[0].message
    assert report.ends["length"] > 100 and report.ends["stop"] > 20


def test_a_kernel_with_faults_breaks_no_promise():
    report = simulate(range(1, 41), 400, "all", jobs=2, shrink_s=5)
    assert not report.failures, report.failures[0].message
    assert sum(report.faults.values()) > 200


@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_fault_strikes_alone(fault):
    kinds = (fault, "crash") if fault in ("lost_sync", "torn_write") else (fault,)
    assert any(play(seed, Options(steps=400, faults=kinds)).faults[fault] for seed in range(1, 400))


def test_the_same_seed_is_the_same_run_in_every_process():
    code = (
        "import llm_os; r = llm_os.simulate(range(1, 9), 300, 'all'); "
        "print(r.trace, r.steps, sorted(r.faults.items()), sorted(r.ends.items()))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] and said[0]


def test_the_number_of_processes_changes_nothing():
    alone, together = simulate(range(1, 7), 200, "all"), simulate(range(1, 7), 200, "all", jobs=3)
    assert alone == together


def test_seeds_differ():
    assert simulate([1], 200, "none").trace != simulate([2], 200, "none").trace


def test_progress_hears_of_every_seed():
    heard: list[int] = []
    simulate([5, 3, 4], 50, "none", progress=lambda outcome: heard.append(outcome.seed))
    assert heard == [5, 3, 4]


def test_each_call_in_turn_can_fail():
    """SQLite's loop: the n-th call that can fail does, for every n until none is left."""
    number, calls = 1, 1
    while number <= calls:
        outcome = play(11, Options(steps=60, fail_call=number))
        assert outcome.failure is None, outcome.failure.message
        number, calls = number + 1, outcome.calls
    assert number > 20


def test_an_unknown_fault_is_refused_with_those_there_are():
    with pytest.raises(llm_os.RequestError, match=r"'nan' is no kind of fault; there are all, none, .*nan_row"):
        simulate([1], 10, "crash,nan")


# -- planted bugs ------------------------------------------------------------------------------------------------------


def pages_of_the_cancelled_leak(patch: pytest.MonkeyPatch) -> None:
    remove = Processes.remove

    def leaky(self: Processes, process: Any) -> None:
        if len(process.generated) > 2:
            process.table = None
        remove(self, process)

    patch.setattr(Processes, "remove", leaky)


def no_copy_on_write(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageTable, "shared", lambda self, position: None)


def tenants_share_a_cache(patch: pytest.MonkeyPatch) -> None:
    root_key = prefix_cache.root_key
    patch.setattr(pager, "root_key", lambda model, tenant: root_key(model, ""))


def the_end_is_told_twice(patch: pytest.MonkeyPatch) -> None:
    end = Processes.end

    def twice(self: Processes, process: Any, reason: Any, *rest: Any, **more: Any) -> None:
        end(self, process, reason, *rest, **more)
        if reason == "cancelled":
            self._outbox.say(ev.Deliver(process.pid, None, process.completion(reason, 0.0)))

    patch.setattr(Processes, "end", twice)


def the_nice_never_run(patch: pytest.MonkeyPatch) -> None:
    enqueue = Scheduler.enqueue
    patch.setattr(
        Scheduler,
        "enqueue",
        lambda self, process, *rest, **more: None if process.nice > 5 else enqueue(self, process, *rest, **more),
    )


PLANTED: list[Callable[[pytest.MonkeyPatch], None]] = [
    pages_of_the_cancelled_leak,
    no_copy_on_write,
    tenants_share_a_cache,
    the_end_is_told_twice,
    the_nice_never_run,
]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_caught_shrunk_and_seen_again(plant, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        plant(patch)
        failure = next(filter(None, (play(seed, Options(steps=400)).failure for seed in range(1, 60))))
        small = shrink(failure, plays=300, seconds=20)
        assert small.kind == failure.kind
        assert len(small.script) < len(failure.script)
        file = save(small, tmp_path / "regressions")
        again = replay(file).failure
        assert again is not None and again.message == small.message and again.story
    assert replay(file).failure is None, "without the bug the same decisions break nothing"


def test_a_file_that_is_no_regression_is_refused(tmp_path):
    file = tmp_path / "x.json"
    for text in ("{", "[]", '{"seed": 1}', "\x00"):
        file.write_text(text)
        with pytest.raises(llm_os.FormatError, match=r"x\.json"):
            replay(file)


def test_a_file_with_a_fault_of_another_version_is_refused(tmp_path, monkeypatch):
    no_copy_on_write(monkeypatch)
    failure = next(filter(None, (play(seed, Options(steps=400)).failure for seed in range(1, 60))))
    file = save(structs.replace(failure, options=Options(steps=1, faults=("gremlin",))), tmp_path)
    with pytest.raises(llm_os.FormatError, match="gremlin"):
        replay(file)


@pytest.mark.parametrize("file", REGRESSIONS, ids=lambda file: file.stem)
def test_what_was_once_found_stays_fixed(file):
    failure = replay(file).failure
    assert failure is None, failure.message
