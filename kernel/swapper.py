"""Takes pages to swap and brings them back: whether it pays, where they go, and what came of it. Numbers only.

    device ──out──> host memory ──demote──> disk         back: from wherever it is; what is damaged is computed again

A swap pays if the way there and back is shorter than computing again, by what both took lately (`costs.py`). Knows
neither which page should go (`pager.py`) nor where contents lie (a SwapStore).
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_os.kernel import events as ev
from llm_os.kernel.costs import Costs
from llm_os.kernel.flights import Flight, Flights
from llm_os.kernel.prefix_cache import PrefixCache
from llm_os.kernel.process import Process
from llm_os.kernel.slab import Page, Slab
from llm_os.kernel.swap import Swap


class Swapper:
    """Between one device and its swap."""

    def __init__(self, flights: Flights, costs: Costs, swap: Swap, cache: PrefixCache) -> None:
        self.swap = swap
        self._flights = flights
        self._costs = costs
        self._cache = cache

    def tier_for(self, slab: Slab, count: int) -> ev.Tier | None:
        """Where so many pages should go. None if it is quicker to compute them again, or there is no room for them:
        what the cache has in swap gives way."""
        size = count * slab.page_bytes
        if size > max(self.swap.capacity.values()):
            return None
        while (tier := self.swap.tier_for(size)) is None:
            page = self._cache.evict_swapped()
            if page is None:
                return None
            self.discard(page)
        return tier if 2 * self._costs.swap_s(size, tier) < size * slab.worth else None

    def out(self, slab: Slab, pages: Sequence[Page], tier: ev.Tier, processes: tuple[Process, ...] = ()) -> None:
        """Start to swap out; `processes` do not run until it has landed. Their places are free then."""
        slots = self.swap.claim(pages, tier)
        numbers = tuple(page.number for page in pages if page.number is not None)
        operation = ev.SwapOut(self._flights.next_id(), slab.model, numbers, slots, tier)
        self._flights.start(operation, processes, tuple(pages))

    def out_landed(self, flight: Flight, slots: tuple[int, ...], tier: ev.Tier) -> None:
        size = 0
        for page, slot in zip(flight.pages, slots, strict=True):
            page.slab.vacate(page)
            page.slot = slot
            size += page.slab.page_bytes
        self._costs.swapped(size, tier, self._flights.now - flight.started)

    def back(self, process: Process) -> bool:
        """Bring back the swapped pages of a process. There is room. False if a page of it is on its way somewhere."""
        assert process.table is not None
        pages = process.table.swapped
        if any(page.busy for page in pages):
            return False
        slab = process.table.slab
        for page in pages:
            placed = slab.place(page)
            assert placed, "back was called without room"
        numbers = tuple(page.number for page in pages if page.number is not None)
        slots = tuple(page.slot for page in pages if page.slot is not None)
        operation = ev.SwapIn(self._flights.next_id(), slab.model, slots, numbers)
        self._flights.start(operation, (process,), tuple(pages))
        slab.moves += 1
        return True

    def back_landed(self, flight: Flight, slots: tuple[int, ...], result: object) -> list[Page]:
        """Returns the pages whose contents are lost. `result` is SwapIn's, None if that failed."""
        good = result if isinstance(result, tuple) and len(result) == len(slots) else ()
        lost: list[Page] = []
        for index, page in enumerate(flight.pages):
            tier = self.swap.tier(slots[index])
            self.discard(page)
            if not good or good[index] is not True:
                lost.append(page)
                page.slab.vacate(page)
                if page.cached:
                    self._cache.remove(page)
        if not lost:
            size = sum(page.slab.page_bytes for page in flight.pages)
            self._costs.swapped(size, tier, self._flights.now - flight.started)
        return lost

    def demote(self) -> None:
        """Move the oldest pages from host memory to disk, when host memory is nearly full."""
        if self._flights.flying(ev.Demote):
            return
        pages = self.swap.surplus()
        if pages:
            self.swap.begin_demotion(pages)
            slots = tuple(page.slot for page in pages if page.slot is not None)
            self._flights.start(ev.Demote(self._flights.next_id(), "", slots), (), tuple(pages))

    def discard(self, page: Page) -> None:
        """Give up its slot."""
        assert page.slot is not None
        self.swap.release((page.slot,))
        self._flights.emit(ev.Discard((page.slot,)))
        page.slot = None
