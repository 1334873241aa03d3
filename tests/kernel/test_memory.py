"""The ledger on its own, driven by random claims."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_os.kernel.errors import Refused
from llm_os.kernel.memory import Memory, fit_page_tokens
from llm_os.kernel.page_table import PageTable

FRAME = 4096


def references(*tables: PageTable) -> dict[str, Counter[int]]:
    counts: Counter[int] = Counter()
    for table in tables:
        counts.update(table.pages)
    return {"m": counts}


@given(st.data())
def test_pages_are_counted_exactly_through_growth_forks_copies_and_ends(data: st.DataObject) -> None:
    memory = Memory(12 * FRAME, FRAME)
    memory.claim_extents("m", (5000, 1))
    slab = memory.open_slab("m", page_tokens=data.draw(st.integers(1, 5)), page_bytes=data.draw(st.integers(900, 4096)))
    tables: list[tuple[PageTable, int]] = [(PageTable(slab), 0)]
    for _ in range(data.draw(st.integers(1, 40))):
        index = data.draw(st.integers(0, len(tables) - 1))
        table, length = tables[index]
        match data.draw(st.sampled_from(["write", "write", "fork", "end"])):
            case "write":
                end = length + data.draw(st.integers(1, 7))
                shortage = table.shortage(length, end)
                before = slab.available
                if shortage <= before:
                    move = table.prepare(length, end)
                    assert slab.available == before - shortage
                    if move:
                        slab.release([move.source])
                    tables[index] = (table, end)
                    touched = table.pages[length // slab.page_tokens :]
                    assert all(slab.references[page] == 1 for page in touched), "a shared page would be written"
            case "fork":
                tables.append((table.fork(length), length))
            case "end":
                table.release()
                tables[index] = (table, 0)
        memory.check(references(*(table for table, _ in tables)))
        info = memory.info([])
        assert info.total == info.free + info.weights + info.workspace + info.kv + info.slack
    for table, _ in tables:
        table.release()
    memory.close_slab("m")
    memory.release_extents("m")
    memory.check({})
    assert memory.free_frames == 12


def test_weights_that_do_not_fit_claim_nothing_and_say_what_is_missing() -> None:
    memory = Memory(4 * FRAME, FRAME)
    with pytest.raises(Refused, match=r"m needs 20 KiB .* 16 KiB of the budget of 16 KiB are free"):
        memory.claim_extents("m", (3 * FRAME, 2 * FRAME))
    memory.check({})
    assert memory.free_frames == 4


def test_a_page_that_an_operation_names_is_not_given_out_again() -> None:
    memory = Memory(FRAME, FRAME)
    slab = memory.open_slab("m", 1, FRAME)
    table = PageTable(slab)
    table.prepare(0, 1)
    fence = list(table.pages)
    slab.retain(fence)
    table.release()
    assert slab.allocate() is None
    slab.release(fence)
    assert slab.allocate() == fence[0]


@given(st.integers(1, 5000), st.integers(4096, 1 << 20))
def test_the_page_size_fits_and_wastes_the_least(kv_bytes: int, frame: int) -> None:
    chosen = fit_page_tokens(range(8, 33), kv_bytes, frame)
    used = {tokens: frame // (tokens * kv_bytes) * tokens for tokens in range(8, 33) if tokens * kv_bytes <= frame}
    assert (chosen is None) == (not used)
    if chosen is not None:
        assert used[chosen] == max(used.values())
