"""KV that nobody holds, a chat between two turns say, goes to swap when others need the room, if that is quicker."""

from __future__ import annotations

from typing import Any

import pytest

from llm_os.kernel import events as ev
from llm_os.kernel.costs import Costs

MODEL = "sim:a?kv_bytes_per_token=1024"  # pages of 16 tokens, 4 to a frame
CHAT = "a chat of many turns. " * 8


def between_turns(machine: type[Any], **config: Any) -> Any:
    """A machine whose cache has a chat, and nothing else."""
    m = machine(memory="6MiB", **config)
    m.submit(1, CHAT, MODEL)
    m.settle()
    assert m.core.memory_info().cached > 0
    return m


def crowd(m: Any, pid: int, beyond: int) -> None:
    """Submit what needs all free pages, and so many more, with its answer."""
    free = m.core.memory_info().free // m.core.memory.slabs[MODEL].page_bytes
    m.submit(pid, "z" * (16 * (free + beyond) - 10), MODEL)


def swapping(m: Any) -> list[ev.SwapOut]:
    return [operation for operation in m.pending if isinstance(operation, ev.SwapOut)]


def test_a_chat_between_two_turns_is_swapped_for_a_newcomer_and_not_computed_again(machine: type[Any]) -> None:
    m = between_turns(machine, swap_host="4MiB")
    crowd(m, 2, beyond=8)
    while not swapping(m):
        m.complete()
    for _ in range(5):
        m.post()
    assert [len(operation.pages) for operation in swapping(m)] == [8]  # what is missing, once
    m.settle()
    assert m.tokens(2) == m.expected(2)
    assert m.core.memory_info().host > 0
    m.submit(3, CHAT + m.text(1) + " and on", MODEL)
    m.settle()
    assert m.deliveries[3][-1].completion.usage.cached_tokens == len(CHAT) + len(m.tokens(1)) - 1
    assert m.tokens(3) == m.expected(3)


def test_growth_swaps_what_nobody_holds_while_others_run(machine: type[Any]) -> None:
    m = between_turns(machine, swap_host="4MiB")
    m.submit(2, "hello", MODEL, sampling={"max_tokens": 40})
    crowd(m, 3, beyond=-1)
    m.settle()
    assert m.core.memory_info().host > 0
    assert m.tokens(2) == m.expected(2) and m.tokens(3) == m.expected(3)


def test_a_chat_whose_swap_fails_gives_its_room_and_is_computed_again(machine: type[Any]) -> None:
    m = between_turns(machine, swap_host="4MiB")

    def refuse(operation: ev.Operation) -> None:
        if isinstance(operation, ev.SwapOut):
            raise OSError("no space")

    m.refuse = refuse
    crowd(m, 2, beyond=8)
    m.settle()
    assert m.core.memory_info().host == 0
    assert m.tokens(2) == m.expected(2)


@pytest.mark.parametrize("swap", ["0", "16KiB"])
def test_a_chat_is_dropped_at_once_where_swap_has_no_room(machine: type[Any], swap: str) -> None:
    m = between_turns(machine, swap_host=swap)
    crowd(m, 2, beyond=8)
    m.until(ev.Run)
    assert m.core.memory_info().host == 0 and not swapping(m)
    m.settle()
    assert m.tokens(2) == m.expected(2)


def test_a_chat_that_is_quicker_computed_again_is_dropped(machine: type[Any]) -> None:
    m = between_turns(machine, swap_host="4MiB")
    m.core.memory.slabs[MODEL].worth = 0.0
    crowd(m, 2, beyond=8)
    m.until(ev.Run)
    assert m.core.memory_info().host == 0 and not swapping(m)


def test_a_chat_that_comes_back_damaged_for_one_who_has_gone_is_not_found_again(machine: type[Any]) -> None:
    m = between_turns(machine, swap_host="4MiB")
    crowd(m, 2, beyond=8)
    m.settle()
    m.submit(3, CHAT + m.text(1), MODEL)
    m.until(ev.SwapIn)
    m.post(ev.Kill(3))
    m.mangle = lambda operation, result: (*result[:-1], False) if isinstance(operation, ev.SwapIn) else result
    m.settle()
    m.mangle = lambda operation, result: result
    m.submit(4, CHAT + m.text(1), MODEL)
    m.settle()
    assert m.tokens(4) == m.expected(4)


def test_a_small_swap_says_little_of_what_a_large_one_takes() -> None:
    costs = Costs()
    large, small = 64 << 20, 64 << 10
    before = costs.swap_s(large, "host")
    for _ in range(100):
        costs.swapped(small, "host", 0.004)
    assert costs.swap_s(small, "host") == pytest.approx(0.004)
    assert costs.swap_s(large, "host") == pytest.approx(before + 0.004, rel=0.01)
    for _ in range(100):
        costs.swapped(large, "host", 0.104)
    assert costs.swap_s(large, "host") == pytest.approx(0.104, rel=0.01)
    assert costs.swap_s(small, "disk") < 0.001
