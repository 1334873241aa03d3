"""Programs end and compute the same with any number of threads, also with those that come late or never."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from llm_os.drivers.native.matrix import ROWS as TOGETHER
from llm_os.drivers.native.program import Program
from llm_os.drivers.native.threads import Team

ROWS, WIDTH, STEPS = 37, 128, 40


class Work:
    """STEPS times: round rows, multiply them, add the norm of that to them. Each step needs all of the one before."""

    def __init__(self, workbench: Any, matrix: Any, integers: Any) -> None:
        self._kernels = workbench.kernels
        self._x = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
        self._y, self._weight = np.zeros((ROWS, WIDTH), np.float32), np.ones(WIDTH, np.float32)
        self._bias = np.zeros(WIDTH, np.float32)
        self._integers = integers(ROWS, WIDTH // 32)
        ((_, packed, blocks),) = matrix.parts
        self._packed = packed
        x, y, weight, bias = (each.ctypes.data for each in (self._x, self._y, self._weight, self._bias))
        codes, terms = self._integers.places
        groups = WIDTH // 32
        number = self._kernels.codes
        step = [
            [number["rounding"], 1, 1, codes, terms, x, 0, groups],
            [
                number["product_Q8"],
                blocks,
                TOGETHER,
                codes,
                terms,
                packed.ctypes.data,
                y,
                groups,
                blocks,
                1,
                WIDTH,
                0,
                bias,
                0,
            ],
            [number["norm_added"], 1, 1, x, 0, y, weight, groups, 0x3727C5AC],
        ]
        self._operations = step * STEPS
        self._state = np.array([ROWS, 0, 0, 0, 0, 0, 0, 0], np.int64)
        self._start = self._x.copy()

    def begin(self, threads: int) -> tuple[Any, ...]:
        """Fresh rows and counters for so many threads; `run` and its arguments but the last, a thread's number. Two
        programs, one after the other."""
        self._x[:] = self._start
        half = len(self._operations) // 2
        parts = self._operations[:half], self._operations[half:]
        self._programs = [Program(part, self._state, threads) for part in parts]
        self._records = np.array([program.record for program in self._programs], np.int64)
        return self._kernels.run, self._records.ctypes.data, len(self._records), threads

    def result(self) -> bytes:
        return self._x.tobytes()


@pytest.fixture
def work(workbench, stored, packed, integers) -> Work:
    return Work(workbench(), packed(stored("Q8_0", WIDTH, WIDTH)), integers)


@pytest.fixture
def expected(work) -> bytes:
    run, *arguments = work.begin(1)
    run(*arguments, 0)
    return work.result()


def test_a_program_has_changed_what_it_was_given(work, expected):
    work.begin(1)
    assert np.isfinite(np.frombuffer(expected, np.float32)).all()
    assert work.result() != expected


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_every_run_of_any_number_of_threads_gives_the_same_bits(work, expected, threads):
    team = Team(threads, "test")
    for _ in range(300):
        team.run(*work.begin(threads))
        assert work.result() == expected
    team.close()


@pytest.mark.parametrize("thread", range(7))
def test_any_thread_alone_does_the_work_of_all(work, expected, thread):
    run, *arguments = work.begin(7)
    run(*arguments, thread)
    assert work.result() == expected


def test_threads_that_never_come_are_not_missed(work, expected):
    team = Team(4, "test")
    here, gate = threading.Barrier(5), threading.Event()

    def hold(_: int) -> None:
        here.wait(60)
        assert gate.wait(60)

    other = threading.Thread(target=team.run, args=(hold,))
    other.start()
    here.wait(60)  # all helpers have something else to do
    team.run(*work.begin(4))
    assert work.result() == expected
    gate.set()
    other.join()
    team.run(*work.begin(4))
    assert work.result() == expected
    team.close()


def test_helpers_that_come_late_leave_finished_work_alone(work, expected):
    """Whoever is held up finds what was asked of it withdrawn: the memory may be somebody else's by then."""
    team = Team(2, "test")
    here, gate, calls = threading.Barrier(3), threading.Event(), []

    def hold(_: int) -> None:
        here.wait(60)
        assert gate.wait(60)

    other = threading.Thread(target=team.run, args=(hold,))
    other.start()
    here.wait(60)
    team.run(lambda _: calls.append(threading.current_thread()))
    gate.set()
    other.join()
    team.run(*work.begin(2))
    team.close()
    assert calls == [threading.current_thread()]


def test_a_thread_that_comes_when_all_is_done_does_nothing(work, expected):
    run, *arguments = work.begin(1)
    run(*arguments, 0)
    run(*arguments, 0)
    assert work.result() == expected


def test_runs_under_load_give_the_same_bits(work, expected):
    """Other threads take the processors, so that helpers are stopped anywhere."""
    done = threading.Event()
    rows = np.random.default_rng(0).standard_normal((64, 64))

    def load() -> None:
        while not done.is_set():
            rows @ rows

    team = Team(2, "test")
    with ThreadPoolExecutor(3) as others:
        loads = [others.submit(load) for _ in range(3)]
        for _ in range(400):
            team.run(*work.begin(2))
            assert work.result() == expected
        done.set()
        for each in loads:
            each.result()
    team.close()


def test_two_teams_at_the_same_time_do_not_mix(workbench, stored, packed, integers, expected):
    matrix = packed(stored("Q8_0", WIDTH, WIDTH))
    works = [Work(workbench(), matrix, integers) for _ in range(2)]

    def runs(work: Work) -> set[bytes]:
        team = Team(2, "test")
        found = set()
        for _ in range(100):
            team.run(*work.begin(2))
            found.add(work.result())
        team.close()
        return found

    with ThreadPoolExecutor(2) as both:
        assert list(both.map(runs, works)) == [{expected}, {expected}]


def test_a_team_maps_in_order_and_raises_what_is_raised():
    team = Team(3, "test")
    assert team.map(lambda n: n * n, range(20)) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        team.map(lambda n: 1 // n, range(-2, 3))
    team.close()


def test_a_team_that_is_closed_has_no_threads():
    before = set(threading.enumerate())
    team = Team(4, "test")
    team.run(lambda _: None)
    team.close()
    assert not set(threading.enumerate()) - before
