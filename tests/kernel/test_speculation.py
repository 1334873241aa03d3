"""Speculative decoding in the core: the same answers as without, in fewer steps, and nothing kept for wrong guesses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_os.kernel import events as ev
from llm_os.kernel.config import Tenant
from llm_os.kernel.driver import RowError, Sampled
from llm_os.kernel.journal import Took, replay

ENDS = "sim:a?end_after=6"


def wrong(position: int, token: int) -> int:
    return 97 + (token - 96) % 26


def answers(m: Any, pid: int = 1) -> int:
    """Batches in which it got a token."""
    return sum(row.sample is not None and row.pid == pid for run in m.runs for row in run.batch.sequences)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_right_guesses_save_steps_and_change_no_token(speculating: Any, machine: Any, temperature: float) -> None:
    m, plain = speculating(), machine()
    for each in (m, plain):
        each.submit(1, "hello", sampling={"max_tokens": 23, "temperature": temperature})
        each.settle()
    assert m.tokens(1) == plain.tokens(1) == m.expected(1) and m.end(1) == plain.end(1) == "length"
    assert answers(plain) == 23 and answers(m) == 5, "each step brings four more, the last one two"
    usage = m.deliveries[1][-1].completion.usage
    assert (usage.drafted_tokens, usage.accepted_tokens, usage.completion_tokens) == (18, 18, 23)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_wrong_guesses_change_nothing(speculating: Any, temperature: float) -> None:
    m = speculating(wrong, page_tokens=2)
    m.submit(1, "hello", sampling={"max_tokens": 20, "temperature": temperature})
    m.settle()
    assert m.tokens(1) == m.expected(1) and answers(m) == 20
    usage = m.deliveries[1][-1].completion.usage
    assert usage.accepted_tokens == 0 and usage.drafted_tokens == 19 * 4 - (1 + 2 + 3)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.booleans(), min_size=60, max_size=60),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([0.0, 1.0]),
    st.integers(6, 40),
)
def test_any_guesses_give_the_tokens_of_a_lone_run(
    speculating: Any, right: list[bool], page_tokens: int, draft_tokens: int, temperature: float, batch_tokens: int
) -> None:
    m = speculating(
        lambda position, token: token if right[position] else wrong(position, token),
        page_tokens=page_tokens,
        draft_tokens=draft_tokens,
        batch_tokens=batch_tokens,
    )
    for pid in (1, 2):
        m.submit(pid, "same" * pid, ENDS, sampling={"max_tokens": 30, "temperature": temperature})
    m.settle()
    for pid in (1, 2):
        assert m.tokens(pid) == m.expected(pid)


def test_what_was_computed_for_a_wrong_guess_is_found_by_nobody(speculating: Any) -> None:
    m = speculating(wrong, page_tokens=4)
    m.submit(1, "hello", sampling={"max_tokens": 15})
    m.settle()
    said = m.tokens(1)
    m.submit(2, "hello" + "".join(map(chr, said)), sampling={"max_tokens": 9})  # begins with what the first one had
    m.submit(3, "hello" + "".join(chr(wrong(0, token)) for token in said), sampling={"max_tokens": 9})
    m.settle()
    assert [m.tokens(pid) == m.expected(pid) for pid in (2, 3)] == [True, True]
    assert m.deliveries[2][-1].completion.usage.cached_tokens >= 16, "the right ones are found"
    assert m.deliveries[3][-1].completion.usage.cached_tokens <= 5, "the wrong ones are not"


def test_pages_for_wrong_guesses_are_given_back(speculating: Any) -> None:
    m = speculating(wrong, page_tokens=1, draft_tokens=9)
    m.submit(1, "hello", sampling={"max_tokens": 30})
    m.until(ev.Run)
    m.complete()
    (process,) = m.core.processes.values()
    assert m.runs[-1].batch.sequences[0].guesses and len(process.table.pages) == 6 + 9
    m.complete()
    m.core.drafting._drafters = ()
    assert len(m.runs[-1].batch.sequences[0].pages) == 7 + 9 and process.computed == 6
    m.complete()
    assert len(process.table.pages) == 8 == process.computed + 1


def test_guesses_take_no_room_from_others(speculating: Any) -> None:
    """So little memory that not all of them fit at once."""
    for right in (True, False):
        fed = []
        for speculation in ("off", "always"):
            spoil = (lambda position, token: token) if right else wrong
            m = speculating(spoil, speculation=speculation, memory=14 * 65536, page_tokens=4, draft_tokens=8)
            for pid in (1, 2, 3):
                m.submit(pid, "p" * 6, "sim:a?layer_bytes=65536", sampling={"max_tokens": 14})
            m.settle()
            assert [m.tokens(pid) for pid in (1, 2, 3)] == [m.expected(pid) for pid in (1, 2, 3)]
            fed.append(sum(len(row.tokens) for run in m.runs for row in run.batch.sequences))
        assert fed[1] <= fed[0], "nothing is computed again that was not without guesses"


def test_a_batch_has_no_more_rows_than_its_budget(speculating: Any) -> None:
    m = speculating(batch_tokens=7)
    for pid in range(1, 6):
        m.submit(pid, "pro", sampling={"max_tokens": 12})
    m.settle()
    rows = [sum(row.end - row.position for row in run.batch.sequences) for run in m.runs]
    assert max(rows) == 7 and all(m.tokens(pid) == m.expected(pid) for pid in range(1, 6))
    assert any(row.guesses for run in m.runs for row in run.batch.sequences)


def test_nobody_guesses_beyond_the_length_of_an_answer(speculating: Any) -> None:
    m = speculating(draft_tokens=30)
    m.submit(1, "hello", "sim:a?context_length=24", sampling={"max_tokens": None})
    m.submit(2, "hello", sampling={"max_tokens": 3})
    m.submit(3, "hello", sampling={"max_tokens": 1})
    m.settle()
    assert [len(m.tokens(pid)) for pid in (1, 2, 3)] == [19, 3, 1]
    assert max(row.end for run in m.runs for row in run.batch.sequences) == 23


def test_an_end_within_right_guesses_ends_the_answer_there(speculating: Any) -> None:
    for pid in range(1, 30):
        m = speculating(draft_tokens=8)
        m.submit(pid, "hello" + "x" * pid, ENDS, sampling={"max_tokens": 40})
        m.settle()
        assert m.tokens(pid) == m.expected(pid) and m.end(pid) in ("stop", "length")
        completion = m.deliveries[pid][-1].completion
        assert completion.token_ids == tuple(m.expected(pid)), "nothing after the end"


def test_a_stop_string_within_right_guesses_ends_the_answer_there(speculating: Any, machine: Any) -> None:
    m, plain = speculating(draft_tokens=8), machine()
    plain.submit(1, sampling={"max_tokens": 30})
    plain.settle()
    stop = plain.text(1)[9:11]
    ends = []
    for each in (m, plain):
        each.submit(2, sampling={"max_tokens": 30, "stop": (stop,)})
        each.settle()
        ends.append((each.text(2), each.tokens(2), each.end(2)))
    assert ends[0] == ends[1] and ends[0][2] == "stop" and stop not in ends[0][0]


def test_a_turn_that_ends_within_right_guesses_is_held_there(speculating: Any, machine: Any) -> None:
    told = []
    for m in (speculating(draft_tokens=8), machine()):
        m.submit(1, model=ENDS, hold=True, sampling={"max_tokens": 200})
        m.settle()
        m.post(ev.Unblock(70, 1, tuple(b"more")))
        m.settle()
        assert m.core.ps()[0].state == "blocked"
        told.append(m.tokens(1))
    assert told[0] == told[1] and told[0].count(256) == 2


def test_who_is_asked_to_stop_stops_after_the_batch_that_runs(speculating: Any, machine: Any) -> None:
    m = speculating()
    m.submit(1, sampling={"max_tokens": 40})
    m.until(ev.Run)
    m.complete()
    m.post(ev.Block(70, 1))
    m.complete()
    assert m.replies[70].error is None and not m.pending
    assert m.tokens(1) == m.expected(1)[: len(m.tokens(1))] and len(m.tokens(1)) == 10
    m.post(ev.Unblock(71, 1, tuple(b"tool")))
    plain = machine()
    plain.submit(2, [*b"hello", *m.tokens(1), *b"tool"], sampling={"max_tokens": 30})
    plain.settle()
    first = m.tokens(1)
    m.core.drafting._drafters = ()  # the oracle knows nothing of tools
    m.settle()
    assert m.tokens(1) == first + plain.tokens(2)


def test_a_fork_begins_where_its_parent_is_after_its_guesses(speculating: Any) -> None:
    m = speculating(page_tokens=4)
    m.submit(1, "z" * 9, sampling={"max_tokens": 20, "temperature": 1.0})
    m.until(ev.Run)
    m.complete()
    m.fork(2, 1)
    m.settle()
    child = m.deliveries[2][-1].completion.token_ids
    shared = len(child) - len(m.tokens(2))
    assert shared == 10 and list(child[:shared]) == m.tokens(1)[:shared] == m.expected(1)[:shared]
    assert m.tokens(1) == m.expected(1) and m.tokens(2) == m.expected(2)


def test_the_journal_has_what_was_right_and_another_life_goes_on_from_there(speculating: Any, tmp_path: Any) -> None:
    m = speculating(lambda position, token: 97 if position % 3 else token, state=tmp_path)
    m.submit(1, sampling={"max_tokens": 20, "temperature": 1.0})
    while len(m.tokens(1)) < 6:
        m.complete()
    sessions = replay(m.journal)
    took = [token for record in sessions[1].since if isinstance(record, Took) for token in record.tokens]
    assert 6 <= len(took) < 20 and took == m.expected(1)[: len(took)]
    other = speculating(state=tmp_path)
    other.requests = m.requests
    other.post(ev.Restore(1, sessions[1]))
    other.settle()
    assert other.tokens(1) == m.expected(1)


@pytest.mark.parametrize("spoil", [wrong, lambda position, token: token])
def test_a_tenant_is_charged_for_its_answers_and_not_for_guesses(speculating: Any, spoil: Any) -> None:
    m = speculating(spoil, prefix_cache=False, tenants={"alice": Tenant(max_tokens=40)})
    for pid in (1, 2):
        m.submit(pid, "12345", tenant="alice", sampling={"max_tokens": 15})
        m.settle()
        assert m.tokens(pid) == m.expected(pid)
    m.submit(3, "1", tenant="alice", sampling={"max_tokens": 1})
    m.settle()
    assert m.end(3) == "Refused" and "has 0 of its 40 tokens left" in m.error(3)
    assert m.core.accounting._accounts["alice"].counter == 2 * (5 + 2 * 15), "and a share is what was answered"


def test_an_end_within_right_guesses_is_charged_as_without_them(speculating: Any, machine: Any) -> None:
    used = []
    tenants = {"alice": Tenant(max_tokens=500)}
    for m in (speculating(draft_tokens=8, tenants=tenants), machine(tenants=tenants)):
        for pid in range(1, 9):
            m.submit(pid, "x" * pid, ENDS, tenant="alice", sampling={"max_tokens": 20})
        m.settle()
        used.append(m.core.accounting._accounts["alice"].used_tokens)
    assert used[0] == used[1]


def test_an_error_that_a_guess_would_have_met_comes_when_it_is_its_turn(speculating: Any) -> None:
    """A driver that fails after a right guess: what came before is told, and the error is the next step's."""
    m = speculating()
    m.submit(1, sampling={"max_tokens": 20})
    m.until(ev.Run)
    m.complete()

    def fail_after_two(operation: Any, rows: Any) -> Any:
        if not isinstance(operation, ev.Run):
            return rows
        m.mangle = lambda operation, rows: (RowError("not a number"),) if isinstance(operation, ev.Run) else rows
        return (Sampled(rows[0].token, more=rows[0].more[:1]),)

    m.mangle = fail_after_two
    m.settle()
    assert m.end(1) == "DriverError" and m.error(1) == "not a number"
    assert m.tokens(1) == m.expected(1)[:7]


def test_a_driver_that_knows_no_guesses_answers_as_ever_and_gets_no_more_of_them(speculating: Any) -> None:
    m = speculating()
    m.mangle = lambda operation, rows: (
        tuple(Sampled(row.token) if isinstance(row, Sampled) else row for row in rows)
        if isinstance(operation, ev.Run)
        else rows
    )
    m.submit(1, sampling={"max_tokens": 20})
    m.settle()
    assert m.tokens(1) == m.expected(1)
    assert sum(bool(row.guesses) for run in m.runs for row in run.batch.sequences) == 3


@pytest.mark.parametrize("more", ["junk", None, (None,), ("x", "y"), (RowError("no"),), [Sampled(97)]])
def test_nonsense_about_guesses_is_left_out(speculating: Any, more: Any) -> None:
    m = speculating()
    m.mangle = lambda operation, rows: (
        tuple(Sampled(row.token, more=more) if isinstance(row, Sampled) else row for row in rows)
        if isinstance(operation, ev.Run)
        else rows
    )
    m.submit(1, sampling={"max_tokens": 20})
    m.settle()
    assert m.end(1) == "length" and m.tokens(1) == m.expected(1)


def test_penalties_and_logprobs_see_the_guesses_before_them(speculating: Any) -> None:
    m = speculating()
    m.submit(1, "abc", sampling={"max_tokens": 9, "presence_penalty": 1.0, "repetition_penalty": 1.5, "logprobs": 2})
    m.settle()
    for run in m.runs:
        for row in run.batch.sequences:
            if row.sample is None:
                continue
            said = m.expected(1)[: len(row.sample.output)]
            assert row.sample.prompt == tuple(b"abc") and row.sample.output == tuple(said)
            for count, guess in enumerate(row.guesses, 1):
                ahead = tuple(each.token for each in row.guesses[:count])
                assert guess.sample.output == (*said, *ahead) and guess.sample.prompt == tuple(b"abc")
    completion = m.deliveries[1][-1].completion
    assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
