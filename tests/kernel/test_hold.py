"""A process that is held waits after each turn: for what it is given, or to be finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

import llm_os
from llm_os.kernel import events as ev
from llm_os.kernel.journal import Given, Took, replay

ENDS = "sim:a?end_after=6"  # about one token in six ends the turn


def held(m: Any, pid: int = 1, **fields: Any) -> None:
    m.submit(pid, model=ENDS, hold=True, **{"sampling": {"max_tokens": 200}, **fields})
    m.settle()


def waits(m: Any, pid: int = 1) -> int:
    """How often its reader was told that it waits."""
    return sum(item.chunk.waiting for item in m.deliveries[pid] if item.chunk)


def state(m: Any, pid: int = 1) -> str:
    [info] = [info for info in m.core.ps() if info.pid == pid]
    return str(info.state)


def test_a_turn_that_ends_is_followed_by_another_one_after_what_was_given(machine: Any) -> None:
    m = machine()
    held(m)
    assert state(m) == "blocked" and waits(m) == 1
    first = m.tokens(1)
    assert first[-1] == 256 and m.deliveries[1][-1].chunk.finish_reason is None
    m.post(ev.Unblock(70, 1, tuple(b"more")))
    m.settle()
    assert state(m) == "blocked" and waits(m) == 2
    m.submit(2, prompt=[*b"hello", *first, *b"more"], model=ENDS, sampling={"max_tokens": 200})  # nobody holds this one
    m.settle()
    assert m.tokens(1)[len(first) :] == m.tokens(2) and m.end(2) == "stop"
    m.post(ev.Finish(71, 1))
    m.settle()
    assert m.end(1) == "stop" and m.replies[71].error is None
    assert m.deliveries[1][-1].completion.token_ids == (*first, *m.tokens(2))
    assert m.core.ps() == []


def test_a_turn_that_used_up_max_tokens_is_not_held(machine: Any) -> None:
    m = machine()
    held(m)
    length = len(m.tokens(1))
    held(m, 2, sampling={"max_tokens": length})
    assert m.end(2) == "stop"


def test_who_is_not_held_cannot_be_finished(machine: Any) -> None:
    m = machine()
    m.submit(1, sampling={"max_tokens": 50})
    m.post(ev.Finish(70, 1), ev.Finish(71, 9))
    assert "process 1 is not held" in str(m.replies[70].error)
    assert "there is no process 9" in str(m.replies[71].error)
    m.settle()
    assert m.end(1) == "length"


def test_who_asked_it_to_stop_is_told_so_when_its_turn_is_over(machine: Any) -> None:
    m = machine()
    m.submit(1, model=ENDS, hold=True, sampling={"max_tokens": 200})
    while 256 not in m.tokens(1):
        if m.pending and isinstance(m.pending[0], ev.Run) and 70 not in m.replies and len(m.runs) == 3:
            m.post(ev.Block(70, 1))
        m.complete()
        if state(m) == "blocked" and 256 not in m.tokens(1):
            m.post(ev.Unblock(71, 1))
    assert state(m) == "blocked"
    m.post(ev.Block(72, 1, 60.0))  # how long it will be
    assert m.replies[72].error is None
    assert m.core.processes[1].resumes == m.now + 60.0


def test_a_fork_of_one_that_is_held_is_held_too(machine: Any) -> None:
    m = machine()
    held(m)
    m.fork(2, 1)
    m.settle()
    assert state(m, 2) == "blocked" and waits(m, 2) == 1
    m.post(ev.Unblock(70, 2, tuple(b"more")), ev.Unblock(71, 1, tuple(b"more")))
    m.settle()
    first = len(m.tokens(1)) - len(m.tokens(2))
    assert m.tokens(1)[first:] == m.tokens(2)


@pytest.mark.parametrize("gift", [b"", b"more"])
def test_a_later_life_holds_it_where_it_was(machine: Any, tmp_path: Path, gift: bytes) -> None:
    m = machine(state=tmp_path)
    held(m)
    later = machine(state=tmp_path)
    [(pid, session)] = replay(m.journal).items()
    later.requests = m.requests
    later.post(ev.Restore(pid, session))
    later.settle()
    assert state(later) == "blocked" and waits(later) == 1 and later.tokens(1) == m.tokens(1)
    for life in (m, later):
        life.post(ev.Unblock(70, 1, tuple(gift)))
        life.settle()
    assert later.tokens(1) == m.tokens(1)
    last = machine(state=tmp_path)  # and the life after that, of what the first has written
    [(pid, session)] = replay(m.journal).items()
    assert [type(record) for record in session.since if not isinstance(record, Took)] == [Given]
    last.post(ev.Restore(pid, session), ev.Finish(71, 1))  # asked before it is there
    last.settle()
    assert last.end(1) == "stop" and last.tokens(1) == m.tokens(1)


def test_a_life_that_begins_right_after_the_gift_goes_on_with_the_next_turn(machine: Any, tmp_path: Path) -> None:
    m = machine(state=tmp_path)
    held(m)
    m.post(ev.Unblock(70, 1, tuple(b"more")))
    while not isinstance(m.journal[-1], Given):
        m.complete()
    later = machine(state=tmp_path)
    [(pid, session)] = replay(m.journal).items()
    later.requests = m.requests
    later.post(ev.Restore(pid, session))
    later.settle()
    m.settle()
    assert later.tokens(1) == m.tokens(1) and waits(m) == 2


def test_the_host_reads_turns_and_ends_them() -> None:
    sampling = llm_os.Sampling(max_tokens=200, temperature=0)
    messages = [{"role": "user", "content": "hello"}]
    with llm_os.Kernel(llm_os.Config(driver="sim", memory="64MiB")) as kernel:
        stream = kernel.stream(llm_os.Request(model=ENDS, messages=messages, hold=True, sampling=sampling))
        turns = [""]
        for chunk in stream:
            turns[-1] += chunk.text
            if chunk.waiting and len(turns) == 3:
                anyio.run(kernel.finish, stream.pid)
            elif chunk.waiting:
                assert kernel.image(stream.pid).turn_end_tokens == {256}
                turns.append("")
                anyio.run(kernel.unblock, stream.pid, list(b"more"))
        assert stream.completion is not None
        assert stream.completion.text == "".join(turns) and stream.completion.finish_reason == "stop"
        assert stream.completion.token_ids.count(256) == 3
        with pytest.raises(llm_os.RequestError, match=f"process {stream.pid} has ended"):
            kernel.image(stream.pid)
