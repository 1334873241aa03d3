"""What holds after every step, recounted from scratch. Called by tests, and by the simulator after each of its steps.

free + extents + held + cached + slack = total (`Memory.check`) · references recounted agree · no page that nobody knows
· no page moved, freed or written by another under a batch · shared pages are not written · every swap slot belongs to
one page · no tenant over its quota · processes and models are in states that go together.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from llm_os.kernel import events as ev
from llm_os.kernel.flights import Flight
from llm_os.kernel.process import Process, State
from llm_os.kernel.slab import Page

if TYPE_CHECKING:
    from llm_os.kernel.core import Core


def check(core: Core) -> None:
    """Raises AssertionError."""
    core.memory.check()
    core.residency.check()
    core.accounting.check()
    core.pager.cache.check()
    flights = list(core.flights)
    pages = _check_references(core, flights)
    _check_swap(core, pages, flights)
    for flight in flights:
        if isinstance(flight.operation, ev.Run):
            _check_run(flight)
    for process in core.table.live.values():
        assert process.state is not State.ENDED
        assert process.computed < max(1, len(process.tokens)), "nothing is left to feed"
        assert process.active <= (process.state in (State.READY, State.RUNNING))
        assert len(process.generated) <= process.max_tokens or not process.tokens
        _check_quota(process)
    for process in core.table.zombies.values():
        assert process.state is State.ENDED and process.flights


def _check_quota(process: Process) -> None:
    """It has no more than was reserved for it, where its tenant has a quota."""
    held = process.reservation
    assert held is not None
    assert held.account.limits.max_tokens is None or process.charged <= held.tokens, "more tokens than were reserved"
    pages = len(process.table.pages) if process.table else 0
    assert held.account.limits.max_pages is None or pages <= held.pages, "more pages than were reserved"


def _check_references(core: Core, flights: list[Flight]) -> list[Page]:
    """Every page is known, and held as often as somebody maps or names it. Returns them all."""
    named: list[Page] = []
    for process in (*core.table.live.values(), *core.table.zombies.values()):
        table = process.table
        if table is not None:
            named += table.pages
            assert {page.slab for page in table.pages} <= {table.slab}, "a page of another model"
            assert process.computed <= len(table.pages) * table.slab.page_tokens
            assert len(table.keys) <= len(table.pages)
    for flight in flights:
        named += flight.pages
    references = Counter(named)
    for page in core.pager.cache:
        references.setdefault(page, 0)
    for page, count in references.items():
        assert page.references == count, "references of a page disagree"
        assert page.references or page.cached, "a page that nobody knows"
        assert page.number is None or page.slab.pages[page.number] is page
    for slab in core.memory.slabs.values():
        for page in slab.pages.values():
            assert page in references, "a page on the device that nobody knows"
    return list(references)


def _check_run(flight: Flight) -> None:
    assert isinstance(flight.operation, ev.Run)
    for fed, process in zip(flight.operation.batch.sequences, flight.processes, strict=True):
        assert process.flights and process.table is not None
        assert fed.pages == tuple(page.number for page in process.table.pages), "a page moved under a batch"
        assert fed.salt == process.salt
        for page in process.table.pages[fed.position // process.table.slab.page_tokens :]:
            assert page.references == 1 and not page.cached, "a shared page is being written"


def _check_swap(core: Core, pages: list[Page], flights: list[Flight]) -> None:
    slots = {page.slot: page for page in pages if page.slot is not None}
    demoting = 0
    for flight in flights:
        if isinstance(flight.operation, ev.SwapOut):
            slots.update(zip(flight.operation.slots, flight.pages, strict=True))
        elif isinstance(flight.operation, ev.Demote):
            demoting += sum(page.slab.page_bytes for page in flight.pages)
    core.pager.swap.check(slots, demoting)
