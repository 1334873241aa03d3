"""What waiting gains a process, until it has run."""

from __future__ import annotations

from typing import Any

from llm_os.kernel import events as ev

MODEL = "sim:a?kv_bytes_per_token=1024"
CHAT = "a chat of many turns. " * 8


def test_who_was_activated_and_cannot_run_yet_keeps_its_age(machine: type[Any]) -> None:
    """Its pages come back from swap, and that takes long: meanwhile a newcomer of a better nice arrives."""
    m = machine(memory="6MiB", swap_host="4MiB", batch_size=1, aging_s=10)
    m.submit(1, CHAT, MODEL)
    m.settle()
    slab = m.core.memory.slabs[MODEL]
    assert m.core.memory_info().cached == 12 * slab.page_bytes
    m.submit(2, "z" * (16 * (m.core.memory_info().free // slab.page_bytes + 12) - 10), MODEL)
    m.settle()
    assert m.core.memory_info().host > 0
    m.submit(3, "hello", MODEL, nice=5)
    m.until(ev.Run)
    m.submit(4, CHAT + m.text(1), MODEL, nice=5)
    while any(isinstance(operation, ev.Encode) for operation in m.pending):
        m.complete(1)
    m.now += 15
    m.post(ev.Kill(3))
    m.complete()
    (back,) = m.pending
    assert isinstance(back, ev.SwapIn)
    m.submit(5, "hello", MODEL, nice=3)
    m.complete(1)
    m.now += 5
    m.complete()
    assert [fed.pid for fed in m.runs[-1].batch.sequences] == [4]
    m.settle()
    assert m.tokens(4) == m.expected(4) and m.tokens(5) == m.expected(5)


def test_a_model_that_is_loaded_to_stay_is_pinned_before_anybody_hears_that_it_is_there(machine: type[Any]) -> None:
    """Others wait for its place, and are more urgent."""
    m = machine(memory="6MiB")
    m.post(ev.LoadModel(1, "sim:a", pin=True))
    m.until(ev.Load)
    m.submit(2, model="sim:b", nice=-20)
    m.complete()
    assert m.replies[1].error is None
    m.settle()
    assert m.end(2) == "Refused" and "unpin" in m.error(2)
    assert m.core.residency.models["sim:a"].where == "on device"
