"""What holds after every step, recounted from scratch. Called by tests, and by the simulator after each of its steps.

free + extents + held + cached + slack = total (`Memory.check`) · references recounted agree · no page that nobody knows
· no page moved, freed or written by another under a batch · shared pages are not written · every swap slot belongs to
one page · no tenant over its quota · processes and models are in states that go together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_os.kernel import events as ev
from llm_os.kernel.flights import Flight
from llm_os.kernel.process import Process, State
from llm_os.kernel.slab import Page

if TYPE_CHECKING:
    from llm_os.kernel.core import Core

_ACTIVE = (State.READY, State.RUNNING)


def check(core: Core) -> None:
    """Raises AssertionError."""
    core.memory.check()
    core.residency.check()
    core.accounting.check()
    core.pager.cache.check()
    flights = list(core.flights)
    _check_swap(core, _check_references(core, flights), flights)
    for flight in flights:
        if isinstance(flight.operation, ev.Run):
            _check_run(flight)
    ended = State.ENDED
    for process in core.table.live.values():
        state, tokens = process.state, len(process.tokens)
        assert state is not ended
        assert process.computed < (tokens or 1), "nothing is left to feed"
        assert not process.active or state in _ACTIVE
        if state is not State.RUNNING and (table := process.table) is not None:
            assert len(table.pages) <= table.slab.pages_for(tokens), "pages of guesses are kept"
        assert not tokens or len(process.generated) <= process.max_tokens
        _check_quota(process)
    for process in core.table.zombies.values():
        assert process.state is State.ENDED and process.flights


def _check_quota(process: Process) -> None:
    """It has no more than was reserved for it, where its tenant has a quota."""
    held, table = process.reservation, process.table
    assert held is not None
    limits = held.account.limits
    assert limits.max_tokens is None or process.charged <= held.tokens, "more tokens than were reserved"
    assert limits.max_pages is None or not table or len(table.pages) <= held.pages, "more pages than were reserved"


def _check_references(core: Core, flights: list[Flight]) -> dict[int, Page]:
    """Every page is known, and held as often as somebody maps or names it. Returns those in swap, by their slots."""
    references = dict.fromkeys(core.pager.cache, 0)
    count = references.get
    for processes in (core.table.live, core.table.zombies):
        for process in processes.values():
            table = process.table
            if table is None:
                continue
            slab, pages = table.slab, table.pages
            for page in pages:
                references[page] = count(page, 0) + 1
                assert page.slab is slab, "a page of another model"
            assert process.computed <= len(pages) * slab.page_tokens
            assert len(table.keys) <= len(pages)
    for flight in flights:
        for page in flight.pages:
            references[page] = count(page, 0) + 1
    slots: dict[int, Page] = {}
    for page, counted in references.items():
        assert page.references == counted, "references of a page disagree"
        assert counted or page.cached, "a page that nobody knows"
        if (number := page.number) is not None:
            assert page.slab.pages.get(number) is page, "a page is not where it says"
        if (slot := page.slot) is not None:
            slots[slot] = page
    for slab in core.memory.slabs.values():
        assert references.keys() >= {*slab.pages.values()}, "a page on the device that nobody knows"
    return slots


def _check_run(flight: Flight) -> None:
    assert isinstance(flight.operation, ev.Run)
    for fed, process in zip(flight.operation.batch.sequences, flight.processes, strict=True):
        assert process.flights and process.table is not None
        assert fed.pages == tuple(page.number for page in process.table.pages), "a page moved under a batch"
        assert fed.salt == process.salt
        end = max(fed.end, len(process.tokens))
        assert len(process.table.pages) <= process.table.slab.pages_for(end), "pages that nobody has asked for"
        for page in process.table.pages[fed.position // process.table.slab.page_tokens :]:
            assert page.references == 1 and not page.cached, "a shared page is being written"


def _check_swap(core: Core, slots: dict[int, Page], flights: list[Flight]) -> None:
    demoting = 0
    for flight in flights:
        if isinstance(flight.operation, ev.SwapOut):
            slots.update(zip(flight.operation.slots, flight.pages, strict=True))
        elif isinstance(flight.operation, ev.Demote):
            demoting += sum(page.slab.page_bytes for page in flight.pages)
    core.pager.swapper.swap.check(slots, demoting)
