"""The ledger: frames, extents, slabs, and pages that move out of an extent's way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_os.kernel.memory import Memory
from llm_os.kernel.slab import Page, Slab, fit_page_tokens

FRAME = 4096


def placed(slab: Slab) -> Page:
    """A page that somebody holds, on the device."""
    page = Page(slab)
    slab.hold(page)
    assert slab.place(page)
    return page


def opened(memory: Memory, model: str, page_bytes: int) -> Slab:
    slab = Slab(memory, model, 4, page_bytes)
    memory.open_slab(slab)
    return slab


def test_extents_are_contiguous_and_all_or_nothing() -> None:
    memory = Memory(8 * FRAME, FRAME)
    first = memory.claim_extents("a", (3 * FRAME, 1))
    assert first is not None and [(e.frame, e.frames) for e in first] == [(0, 3), (3, 1)]
    assert memory.claim_extents("b", (2 * FRAME, 3 * FRAME)) is None
    memory.check()
    assert memory.free_frames == 4
    memory.release_extents("a")
    assert memory.free_frames == 8


def test_a_page_in_two_places_while_it_is_copied_and_in_one_after() -> None:
    memory = Memory(4 * FRAME, FRAME)
    slab = opened(memory, "m", FRAME // 2)
    page = placed(slab)
    before = page.number
    target = slab.reserve(page)
    assert target is not None and before is not None
    page.busy = 1
    memory.check()
    slab.moved(page, target)
    page.busy = 0
    assert page.number == target and list(slab.pages) == [target]
    memory.check()


def test_an_extent_over_pages_is_whole_when_they_have_moved_out() -> None:
    memory = Memory(6 * FRAME, FRAME)
    slab = opened(memory, "m", FRAME)
    pages = [placed(slab) for _ in range(6)]
    for page in pages[1::2]:  # frames 4, 2, 0 are free: no two side by side
        slab.vacate(page)
        page.references = 0
    assert memory.free_frames == 3 and memory.claim_extents("w", (2 * FRAME,)) is None
    claim = memory.claim_clearing("w", (2 * FRAME,))
    assert claim is not None
    extents, moving = claim
    assert len(moving) == 1 and not memory.clear("w"), "as few pages move as can be"
    memory.check()
    for page in moving:
        target = slab.reserve(page)
        assert target is not None
        frames = range(extents[0].frame, extents[0].frame + 2)
        assert target not in frames, "a frame that is being cleared takes no page"
        page.busy = 1
        slab.moved(page, target)
        page.busy = 0
    assert memory.clear("w")
    memory.check()
    memory.release_extents("w")
    memory.check()


def test_an_extent_that_is_given_up_leaves_the_pages_that_were_to_move() -> None:
    memory = Memory(4 * FRAME, FRAME)
    slab = opened(memory, "m", FRAME // 2)
    pages = [placed(slab) for _ in range(5)]
    slab.vacate(pages[0])
    assert memory.claim_clearing("w", (2 * FRAME,)) is not None
    memory.check()
    memory.release_extents("w")
    memory.check()
    assert sorted(slab.pages) == sorted(page.number for page in pages[1:] if page.number is not None)


def test_a_busy_page_is_not_asked_to_move() -> None:
    memory = Memory(3 * FRAME, FRAME)
    slab = opened(memory, "m", FRAME)
    pages = [placed(slab) for _ in range(3)]
    slab.vacate(pages[0])
    slab.vacate(pages[2])
    pages[1].busy = 1
    assert memory.claim_clearing("w", (2 * FRAME,)) is None
    memory.check()


@given(st.lists(st.tuples(st.sampled_from("phufc"), st.integers(0, 9)), max_size=60), st.integers(1, 4))
def test_any_sequence_of_placing_holding_and_freeing_balances(steps: list[tuple[str, int]], slots: int) -> None:
    memory = Memory(8 * FRAME, FRAME)
    slabs = [opened(memory, "a", FRAME // slots), opened(memory, "b", FRAME)]
    pages: list[Page] = []
    claims = 0
    for what, which in steps:
        slab = slabs[which % 2]
        page = pages[which % len(pages)] if pages else None
        if what == "p":
            potential = slab.potential
            assert slab.available <= potential
            fresh = Page(slab)
            slab.hold(fresh)
            if slab.place(fresh):
                pages.append(fresh)
            else:
                assert slab.available == 0
        elif what == "h" and page:
            page.slab.hold(page)
        elif what == "u" and page and page.references:
            page.slab.unhold(page)
        elif what == "f" and page and not page.references:
            page.slab.vacate(page)
            pages.remove(page)
        elif what == "c" and memory.claim_extents(f"w{claims}", (FRAME * (which + 1),)):
            claims += 1
        memory.check()
        info = memory.info(())
        assert info.total == info.free + info.weights + info.kv + info.cached + info.slack
    for page in pages:
        while page.references:
            page.slab.unhold(page)
        page.slab.vacate(page)
    for number in range(claims):
        memory.release_extents(f"w{number}")
    for slab in slabs:
        memory.close_slab(slab)
    assert memory.free_frames == 8


@given(st.integers(1, 5000), st.integers(4096, 1 << 20))
def test_the_page_size_fits_and_wastes_the_least(kv_bytes: int, frame: int) -> None:
    chosen = fit_page_tokens(range(8, 33), kv_bytes, frame)
    used = {tokens: frame // (tokens * kv_bytes) * tokens for tokens in range(8, 33) if tokens * kv_bytes <= frame}
    assert (chosen is None) == (not used)
    if chosen is not None:
        assert used[chosen] == max(used.values())
