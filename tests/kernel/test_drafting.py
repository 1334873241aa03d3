"""How many guesses are checked: as many as make a batch quicker, by what batches took and how good guesses were."""

from __future__ import annotations

from typing import Any

import pytest

from llm_os.kernel import events as ev
from llm_os.kernel.costs import BatchTimes
from llm_os.kernel.drafting import Guesser


def times(**rows: float) -> BatchTimes:
    found = BatchTimes()
    for _ in range(30):  # few would be believed in part
        for name, seconds in rows.items():
            found.measured(int(name[1:]), seconds)
    return found


def about(seconds: list[float]) -> Any:
    return pytest.approx(seconds, rel=0.03)


def run(m: Any, seconds: Any, steps: int) -> None:
    """Let batches take what `seconds(rows)` says, until so many have run."""
    m.tick = 0.0
    while steps and m.pending:
        if isinstance(operation := m.pending[0], ev.Run):
            m.now += seconds(sum(row.end - row.position for row in operation.batch.sequences))
            steps -= 1
        m.complete()


def guesses(m: Any, last: int = 1 << 30) -> list[int]:
    """Of each batch, of the last so many."""
    return [sum(len(row.guesses) for row in run.batch.sequences) for run in m.runs][-last:]


def flat(rows: int) -> float:
    return 1.0


def proportional(rows: int) -> float:
    return rows * 0.1


# -- what batches take -------------------------------------------------------------------------------------------------


def test_nothing_is_known_of_a_batch_that_never_ran() -> None:
    assert BatchTimes().curve(1, 4) is None
    assert times(r2=1.0).curve(1, 4) is None


def test_between_measurements_is_a_line_and_beyond_them_it_goes_on() -> None:
    assert times(r1=1.0, r3=2.0).curve(1, 4) == about([1.0, 1.5, 2.0, 2.5, 3.0])


def test_more_rows_never_take_less() -> None:
    assert times(r1=1.0, r4=0.5, r6=2.0).curve(1, 5) == about([1.0, 1.0, 1.0, 1.0, 1.5, 2.0])


def test_more_rows_take_no_more_than_in_proportion() -> None:
    assert times(r1=1.0, r2=9.0).curve(1, 3) == about([1.0, 9.0, 13.5, 18.0])


def test_what_fewer_rows_took_tells_what_more_will() -> None:
    curve = times(r8=1.0, r10=1.2).curve(10, 2)
    assert curve == about([1.2, 1.3, 1.4])


def test_a_first_measurement_is_believed_in_part() -> None:
    found = times(r1=1.0)
    found.measured(2, 2.0)
    curve = found.curve(1, 1)
    assert curve is not None and curve[1] == pytest.approx(1.4)


def test_one_slow_batch_is_forgotten() -> None:
    found = times(r1=1.0)
    found.measured(1, 500.0)
    curve = found.curve(1, 0)
    assert curve is not None and curve[0] < 1.2
    found.measured(2, 1.0)
    for _ in range(BatchTimes.FRESH):
        found.measured(2, 1.0)
    assert found.curve(1, 1) is None, "what is old is measured again"


# -- how good guesses are ----------------------------------------------------------------------------------------------


def test_the_chance_of_a_guess_follows_what_came_of_the_last_ones() -> None:
    guesser = Guesser([], range(9), frozenset())
    assert guesser.chance == 0.5
    for _ in range(20):
        guesser.checked(4, 4)
    assert guesser.chance > 0.95
    for _ in range(20):
        guesser.checked(4, 0)
    assert guesser.chance < 0.15


# -- what is decided ---------------------------------------------------------------------------------------------------


def auto(speculating: Any, *spoil: Any, **config: Any) -> Any:
    return speculating(*spoil, speculation="auto", draft_tokens=8, memory="256MiB", **config)


def test_right_guesses_are_checked_where_more_rows_cost_little(speculating: Any) -> None:
    m = auto(speculating)
    m.submit(1, sampling={"max_tokens": 200})
    run(m, flat, 30)
    assert sum(guesses(m, 10)) >= 75
    m.settle()
    assert m.tokens(1) == m.expected(1)


def test_no_guess_is_checked_where_rows_cost_in_proportion(speculating: Any) -> None:
    m = auto(speculating)
    m.submit(1, sampling={"max_tokens": 400})
    run(m, proportional, 60)
    assert sum(guesses(m, 40)) == 0


def test_a_large_batch_that_computes_at_full_speed_checks_none_and_a_small_one_some(speculating: Any) -> None:
    def seconds(rows: int) -> float:  # reading the weights, or computing
        return max(0.8, rows * 0.1)

    m = auto(speculating)
    for pid in range(1, 17):
        m.submit(pid, sampling={"max_tokens": 30 if pid > 1 else 90})
    run(m, seconds, 20)
    assert sum(guesses(m, 12)) == 0
    run(m, seconds, 25)
    assert len(m.core.processes) == 1 and sum(guesses(m, 5)) >= 20


def test_wrong_guesses_are_asked_for_ever_more_rarely(speculating: Any) -> None:
    m = auto(speculating, lambda position, token: 97 + (token - 96) % 26)
    m.submit(1, sampling={"max_tokens": 600})
    run(m, lambda rows: 1 + 0.1 * rows, 400)
    checked = guesses(m)
    assert sum(checked) > 0 and sum(map(bool, checked[:100])) >= 4
    assert sum(checked[-200:]) <= 40, "one row in five steps"


def test_a_process_whose_guesses_become_right_is_found_again(speculating: Any) -> None:
    m = auto(speculating, lambda position, token: token if position > 200 else 97 + (token - 96) % 26)
    m.submit(1, sampling={"max_tokens": 900})
    run(m, lambda rows: 1 + 0.05 * rows, 330)
    assert sum(guesses(m, 30)) > 100


def test_the_good_guesses_of_one_are_checked_beside_the_bad_ones_of_another(speculating: Any) -> None:
    m = auto(speculating, lambda position, token: token)
    oracle, bad = m.oracle, 97

    def spoil(position: int, token: int) -> int:
        return token if oracle.machine.requests[current[0]][0].prompt == "good" else bad

    current = [0]
    opened = oracle.open

    def open(context: Any) -> Any:
        draft = opened(context)
        guess = draft.guess

        def named(new: Any, limit: int) -> Any:
            current[0] = context.pid
            return guess(new, limit)

        draft.guess = named
        return draft

    oracle.open, oracle.spoil = open, spoil
    m.submit(1, "good", sampling={"max_tokens": 900})
    m.submit(2, "bad", sampling={"max_tokens": 900})
    run(m, lambda rows: 1 + 0.08 * rows, 60)
    last = [row for run in m.runs[-10:] for row in run.batch.sequences]
    assert sum(len(row.guesses) for row in last if row.pid == 1) > 40
    assert sum(len(row.guesses) for row in last if row.pid == 2) <= 8


def test_a_batch_with_a_prompt_in_it_checks_no_guesses(speculating: Any) -> None:
    m = auto(speculating)
    m.submit(1, sampling={"max_tokens": 200})
    run(m, flat, 20)
    m.submit(2, "prompt" * 20, sampling={"max_tokens": 20})
    run(m, flat, 2)
    mixed = [run.batch.sequences for run in m.runs if {1, 2} == {row.pid for row in run.batch.sequences}]
    assert len(mixed[0][1].tokens) == 120 and not any(row.guesses for row in mixed[0])


def test_the_same_events_give_the_same_guesses(speculating: Any) -> None:
    told = []
    for _ in range(2):
        m = auto(speculating, lambda position, token: token if position % 7 else 97)
        for pid in (1, 2):
            m.submit(pid, "x" * pid, sampling={"max_tokens": 120})
        run(m, lambda rows: 1 + 0.07 * rows, 60)
        told.append(guesses(m))
    assert told[0] == told[1] and sum(told[0]) > 50


@pytest.mark.parametrize("speculation", ["auto", "off"])
def test_without_drafters_or_switched_off_nobody_guesses(machine: Any, speculating: Any, speculation: str) -> None:
    m = machine(speculation="auto") if speculation == "auto" else speculating(speculation="off")
    m.submit(1, sampling={"max_tokens": 30})
    m.settle()
    assert sum(guesses(m)) == 0
