"""Sessions of an earlier life, and forks, that come before their model is open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_os.kernel import events as ev
from llm_os.kernel.config import Tenant
from llm_os.kernel.journal import Blocked, replay


def test_a_session_that_was_blocked_and_is_asked_to_block_again_waits_once(machine: type[Any]) -> None:
    first = machine(state=Path("state"))
    first.submit(1, sampling={"max_tokens": 8})
    first.until(ev.Run)
    first.post(ev.Block(70, 1))
    while 70 not in first.replies:
        first.complete()
    assert isinstance(first.journal[-1], Blocked)
    m = machine(state=Path("state"))
    m.requests = first.requests
    m.post(ev.Restore(1, replay(first.journal)[1]))
    m.post(ev.Block(71, 1))
    m.settle()
    assert m.replies[71].error is None and m.core.processes
    m.post(ev.Unblock(72, 1))
    m.settle()
    assert m.replies[72].error is None and m.tokens(1) == m.expected(1)
    m.post(ev.UnloadModel(73, "sim:a"))
    m.settle()
    assert m.replies[73].error is None


def test_a_session_goes_on_with_the_nice_that_it_was_given_and_so_does_its_fork(machine: type[Any]) -> None:
    first = machine(state=Path("state"))
    first.submit(1, sampling={"max_tokens": 8}, nice=3)
    first.until(ev.Run)
    first.post(ev.Renice(70, 1, -7))
    first.complete()
    first.fork(2, 1)
    while len(first.tokens(2)) < 2:
        first.complete()
    sessions = replay(first.journal)
    for pid in (1, 2):
        assert list(replay(sessions[pid].records).values()) == [sessions[pid]]  # as a log writes it anew
    m = machine(state=Path("state"))
    m.requests = first.requests
    m.post(*(ev.Restore(pid, sessions[pid]) for pid in (1, 2)))
    assert [info.nice for info in m.core.ps()] == [-7, -7]
    m.post(ev.Renice(71, 1, 5))
    m.until(ev.Run)
    assert replay([*first.journal, *m.journal])[1].nice == 5
    m.settle()
    assert m.tokens(1) == m.expected(1)


def test_samples_of_a_request_wait_until_its_model_is_open(machine: type[Any]) -> None:
    m = machine()
    m.submit(1, sampling={"temperature": 1.0})
    m.fork(2, 1, from_prompt=True)
    m.settle()
    assert m.tokens(1) == m.expected(1) and m.tokens(2) == m.expected(2) and m.tokens(1) != m.tokens(2)


def test_a_model_that_cannot_be_opened_ends_a_request_and_its_samples_once_each(machine: type[Any]) -> None:
    m = machine()
    m.submit(1, model="sim:a?layers=many")
    m.fork(2, 1, from_prompt=True)
    m.settle()
    assert m.end(1) == "ModelNotFound" and m.end(2) == "RequestError" and not m.core.processes


def lives(machine: type[Any], **config: Any) -> tuple[Any, Any]:
    """A first life in which two sessions took three tokens each, and a second one that has not begun."""
    first = machine(state=Path("state"))
    for pid in (1, 2):
        first.submit(pid, f"{pid} asks", sampling={"max_tokens": 8})
    while min(len(first.tokens(pid)) for pid in (1, 2)) < 3:
        first.complete()
    second = machine(state=Path("state"), **config)
    second.requests = first.requests
    return first, second


def test_restored_sessions_are_held_to_no_limit_of_arrival(machine: type[Any]) -> None:
    first, m = lives(machine, queue_limit=1, queue_s=0.5, tenants={"": Tenant(max_processes=1)})
    for pid, session in replay(first.journal).items():
        m.post(ev.Restore(pid, session))
    assert len(m.core.processes) == 2
    m.submit(3)
    assert m.end(3) == "Refused", "newcomers are"
    m.settle()
    assert m.tokens(1) == m.expected(1) and m.tokens(2) == m.expected(2)


def test_a_session_that_this_life_has_no_room_for_is_kept_for_another(machine: type[Any]) -> None:
    first, m = lives(machine, memory=10 * 65536)
    for pid, session in replay(first.journal).items():
        m.post(ev.Restore(pid, session))
    m.settle()
    assert m.end(1) == m.end(2) == "Refused"
    assert replay([*first.journal, *m.journal]).keys() == {1, 2}


def test_an_answer_whose_reader_went_away_before_reading_it_is_forgotten(machine: type[Any]) -> None:
    m = machine(state=Path("state"))
    m.submit(1)
    m.settle()
    assert replay(m.journal).keys() == {1}
    m.post(ev.Kill(1))
    m.settle()
    assert not replay(m.journal)


def test_a_session_whose_reader_goes_away_while_the_kernel_halts_is_kept(machine: type[Any]) -> None:
    m = machine(state=Path("state"))
    m.submit(1, sampling={"max_tokens": 100})
    while not m.tokens(1):
        m.complete()
    m.post(ev.Halt(), ev.Kill(1))
    m.settle()
    assert replay(m.journal).keys() == {1} and m.core.halted


def test_what_is_asked_of_a_session_before_its_model_is_open_is_done_in_order(machine: type[Any]) -> None:
    first = machine(state=Path("state"))
    first.submit(1, sampling={"max_tokens": 8})
    first.until(ev.Run)
    first.post(ev.Block(70, 1))
    while 70 not in first.replies:
        first.complete()
    m = machine(state=Path("state"))
    m.requests = first.requests
    m.post(ev.Restore(1, replay(first.journal)[1]))
    m.post(ev.Unblock(71, 1))
    m.post(ev.Block(72, 1))
    m.settle()
    assert m.replies[71].error is None and m.replies[72].error is None
    assert [info.state for info in m.core.ps()] == ["blocked"], "it was asked to stop last"
    m.post(ev.Unblock(73, 1))
    m.settle()
    assert m.tokens(1) == m.expected(1)
