"""Random life: submits, forks, kills, loads, and operations that complete late and out of order.

After every step the ledger balances; in the end every process ended once, with the tokens of a lone run.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_os.kernel import events as ev

MODELS = ("sim:a?layer_bytes=65536", "sim:b?layer_bytes=65536&kv_bytes_per_token=12000&end_after=20")

steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.integers(1, 25),  # prompt tokens
            st.integers(1, 15),  # max_tokens
            st.integers(0, 1),  # model
            st.integers(-2, 2),  # nice
            st.sampled_from(["", "alice"]),
            st.sampled_from([0.0, 1.0]),
        ),
        st.tuples(st.just("complete"), st.integers(0, 5)),
        st.tuples(st.just("complete"), st.integers(0, 5)),
        st.tuples(st.just("complete"), st.integers(0, 5)),
        st.tuples(st.just("kill"), st.integers(0, 20)),
        st.tuples(st.just("fork"), st.integers(0, 20)),
        st.tuples(st.just("unload"), st.integers(0, 1)),
    ),
    min_size=10,
    max_size=80,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps, st.integers(14, 32), st.integers(1, 4), st.integers(2, 40), st.integers(1, 4), st.integers(0, 6))
def test_any_life_of_many_processes_gives_each_the_tokens_of_a_lone_run(
    speculating: Any,
    steps: list[tuple[Any, ...]],
    frames: int,
    page_tokens: int,
    batch_tokens: int,
    batch_size: int,
    wrong: int,  # every so many guesses one is wrong; 0 is without guesses
) -> None:
    m = speculating(
        lambda position, token: 97 if position % wrong == 0 else token,
        memory=frames * 65536,
        page_tokens=page_tokens,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
        speculation="always" if wrong else "off",
    )
    pids: list[int] = []
    killed: set[int] = set()
    ticket = 10_000
    for step in steps:
        match step:
            case ("submit", length, max_tokens, model, nice, tenant, temperature):
                pids.append(len(pids) + 1)
                sampling = {"max_tokens": max_tokens, "temperature": temperature}
                m.submit(pids[-1], "p" * length, MODELS[model], nice=nice, tenant=tenant, sampling=sampling)
            case ("complete", index) if m.pending:
                m.complete(index % len(m.pending))
            case ("kill", index) if pids:
                pid = pids[index % len(pids)]
                if pid in m.core.processes:
                    killed.add(pid)
                m.post(ev.Kill(pid))
            case ("fork", index) if pids:
                parent = pids[index % len(pids)]
                pids.append(len(pids) + 1)
                m.fork(pids[-1], parent)
            case ("unload", model):
                ticket += 1
                m.post(ev.UnloadModel(ticket, MODELS[model]))
    m.settle()
    for pid in pids:
        reason = m.end(pid)
        if reason in ("Refused", "RequestError"):
            continue
        assert (reason == "cancelled") == (pid in killed), "a kill is never lost"
        expected, got = m.expected(pid), m.tokens(pid)
        assert got == expected[: len(got)], f"process {pid} read a cell that is not its own"
        if reason in ("length", "stop"):
            assert got == expected
    assert not m.core.processes and m.core.memory_info().kv == 0
    m.post(ev.Halt())
    m.settle()
    assert m.core.halted and m.core.memory_info().free == m.core.memory_info().total
