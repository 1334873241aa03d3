"""Brings KV pages where they are needed: growth, sharing, eviction, swap and moves. Numbers only; drivers move bytes.

                    grow                 release
    nobody's ──────────────> held <──────────────> cached ──evict──> nobody's
                              │  ^                   │  ^
                      swap out│  │swap in            │  │
                              v  │                   v  │
                             swapped             cached, swapped

Every change of place is an operation. While it is in flight the processes concerned do not run, and its pages are held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing

from llm_os.kernel import events as ev
from llm_os.kernel.costs import Costs
from llm_os.kernel.driver import Move
from llm_os.kernel.flights import Flight, Flights
from llm_os.kernel.memory import Memory
from llm_os.kernel.page_table import PageTable
from llm_os.kernel.prefix_cache import PrefixCache, page_key, root_key
from llm_os.kernel.process import Process
from llm_os.kernel.slab import Page, Slab
from llm_os.kernel.swap import Swap
from llm_os.kernel.swapper import Swapper


class Pager:
    """The pages of one device, and of what has been swapped from it."""

    def __init__(self, memory: Memory, flights: Flights, costs: Costs, swap: Swap, sharing: bool) -> None:
        self.memory = memory
        self.cache = PrefixCache()
        self.swapper = Swapper(flights, costs, swap, self.cache)
        self._flights = flights
        self._sharing = sharing

    @property
    def freeing(self) -> bool:
        """Whether an operation in flight will free device pages when it lands."""
        return self._flights.flying(ev.SwapOut)

    # -- growth ------------------------------------------------------------------------------------------------------

    def room_for(self, slab: Slab, count: int) -> bool:
        """Evict cached pages until so many pages can be placed. False if that is not enough, evicting nothing, or not
        yet: pages that are quicker swapped than computed again are on their way (`freeing`)."""
        if slab.available >= count:
            return True
        if self.freeing or slab.potential < count:
            return False
        for pages in self._least(slab, count - slab.available).values():
            self._evict(pages)
        return slab.available >= count

    def _least(self, slab: Slab, count: int) -> dict[Slab, list[Page]]:
        """The cached pages of least worth that make room for so many pages of `slab`: its own, and whole frames of
        others. None if there are not so many."""
        least: dict[Slab, list[Page]] = {slab: []}
        frames: dict[tuple[Slab, int], list[Page]] = {}
        with closing(self.cache.ranked()) as pages:
            while count > 0 and (page := next(pages, None)) is not None:
                if page.slab is slab:
                    least[slab].append(page)
                    count -= 1
                elif self._alone(page):
                    assert page.number is not None
                    frame = page.number // page.slab.slots
                    together = frames.setdefault((page.slab, frame), [])
                    together.append(page)
                    if len(together) == page.slab.used[frame]:
                        least.setdefault(page.slab, []).extend(together)
                        count -= slab.slots
        return least if count <= 0 else {}

    def _evict(self, pages: list[Page]) -> None:
        """Swap or drop cached pages of one slab."""
        for page in pages:
            self.cache.leaves(page)
        tier = self.swapper.tier_for(pages[0].slab, len(pages)) if pages else None
        if tier is not None:
            self.swapper.out(pages[0].slab, pages, tier)
            return
        for page in pages:
            self.cache.remove(page)
            self.free(page)

    def grow(self, process: Process, end: int) -> bool:
        """Make positions up to `end` writable. There is room (`room_for`). True if a page is being copied for it: the
        process can run when that has landed."""
        table = process.table
        assert table is not None
        slab = table.slab
        copying = table.shared(process.computed)
        self.add_pages(process, end)
        if copying is None:
            return False
        target = Page(slab)
        slab.hold(target)
        placed = slab.place(target)
        assert placed, "grow was called without room"
        source = table.replace(copying, target)
        del table.keys[copying:]
        assert source.number is not None and target.number is not None
        move = Move(source=source.number, target=target.number)
        self._flights.start(ev.Copy(self._flights.next_id(), slab.model, (move,)), (process,), (source, target))
        self.let_go(source)
        return True

    def add_pages(self, process: Process, end: int) -> None:
        """Add what its table lacks for positions up to `end`. There is room."""
        table = process.table
        assert table is not None
        while len(table.pages) * table.slab.page_tokens < end:
            page = Page(table.slab)
            table.add(page)
            placed = table.slab.place(page)
            assert placed, "pages were added without room"

    def trim(self, process: Process) -> None:
        """Give up pages beyond its tokens: they were for guesses."""
        table = process.table
        if table is not None and len(table.pages) > (needed := table.slab.pages_for(len(process.tokens))):
            for page in table.cut(needed):
                self.let_go(page)

    # -- sharing -----------------------------------------------------------------------------------------------------

    def attach(self, process: Process) -> None:
        """Map the pages of the prefix cache that hold what the process begins with. One token at least is left to feed:
        the next one is chosen from its logits."""
        table, tokens = process.table, process.tokens
        if table is None or table.pages or not self._sharing:
            return
        size, limit = table.slab.page_tokens, len(tokens) - 1
        key = root_key(process.request.model, process.request.tenant)
        found = 0
        while found + size <= limit:
            following = page_key(key, tokens[found : found + size])
            page = self.cache.full(following)
            if page is None or page.busy:
                break
            key = following
            table.keys.append(key)
            self._take(table, page)
            found += size
        tail = self.cache.tail(key)
        if tail is not None and not tail.busy and tail.references == 0:
            alike = _common(tail.tokens, tokens[found:limit])
            if alike:
                self.cache.remove(tail)  # it is this process's now, to write on
                self._take(table, tail)
                found += alike
        process.computed = found
        process.charged = max(process.charged, found)
        if process.admitted is None:
            process.cached = min(found, process.prompt_tokens)

    def _take(self, table: PageTable, page: Page) -> None:
        page.uses += 1
        table.add(page)

    def list_full(self, process: Process) -> None:
        """List the pages that became full in the prefix cache; a page that is listed already is shared instead."""
        table = process.table
        if table is None or not self._sharing:
            return
        size = table.slab.page_tokens
        while (len(table.keys) + 1) * size <= process.computed:
            index = len(table.keys)
            before = table.keys[-1] if index else root_key(process.request.model, process.request.tenant)
            key = page_key(before, process.tokens[index * size : (index + 1) * size])
            table.keys.append(key)
            page, twin = table.pages[index], self.cache.full(key)
            if page.cached:
                continue
            if twin is None:
                self.cache.insert(key, page)
            elif twin.number is not None and not twin.busy and page.references == 1 and not page.busy:
                twin.slab.hold(twin)
                self.let_go(table.replace(index, twin))

    def release(self, process: Process) -> None:
        """The process needs its pages no more, for now: those with a name stay in the cache until room is needed."""
        table = process.table
        if table is None:
            return
        size = table.slab.page_tokens
        index, rest = divmod(process.computed, size)
        if self._sharing and rest and len(table.keys) == index < len(table.pages):
            page = table.pages[index]
            if page.references == 1 and not page.cached and not page.busy:
                before = table.keys[-1] if index else root_key(process.request.model, process.request.tenant)
                displaced = self.cache.insert_tail(before, process.tokens[index * size : process.computed], page)
                if displaced is not None and not displaced.references:
                    self.free(displaced)
        for page in table.cut(0):
            self.let_go(page)
        process.recede(0)

    def distrust(self, process: Process) -> None:
        """Something read from these pages was no answer: nobody else shall find them."""
        for page in process.table.pages if process.table else ():
            if page.cached:
                self.cache.remove(page)

    def let_go(self, page: Page) -> None:
        """One reference less. A page that nobody holds rests in the cache, or is freed."""
        page.slab.unhold(page)
        if page.references:
            return
        if page.cached:
            self.cache.rest(page)
        else:
            self.free(page)

    def free(self, page: Page) -> None:
        """Give up a page that nobody holds and that is not listed any more, wherever it is."""
        assert not page.references and not page.cached
        if page.number is not None:
            page.slab.vacate(page)
        if page.slot is not None:
            self.swapper.discard(page)

    def forget(self, slab: Slab) -> None:
        """Drop what the cache has of a model."""
        for page in [page for page in self.cache if page.slab is slab]:
            self.cache.remove(page)
            if not page.references:
                self.free(page)

    # -- eviction ----------------------------------------------------------------------------------------------------

    def free_frames(self, count: int) -> None:
        """Empty so many frames that hold nothing but cached pages, the least worth first. Those whose pages are swapped
        are free when that has landed."""
        frames = [(slab, frame) for slab in self.memory.slabs.values() for frame in slab.reclaimable_frames()]
        frames.sort(key=lambda place: max(page.rent for page in place[0].pages_in(place[1])))
        leaving: dict[Slab, list[Page]] = {}
        for slab, frame in frames[: max(0, count)]:
            leaving.setdefault(slab, []).extend(slab.pages_in(frame))
        for pages in leaving.values():
            self._evict(pages)

    def take(self, process: Process) -> bool:
        """Take the device pages of a process that is not active: swap those that only it has, if that is quicker than
        to compute them again, else let all of them go. True if they are free now, False if they will be."""
        table = process.table
        assert table is not None and not process.flights
        for page in table.cut(table.slab.pages_for(process.computed)):  # nothing has been written to these
            self.let_go(page)
        pages = [page for page in table.pages if page.number is not None and page.references == 1 and not page.busy]
        tier = self.swapper.tier_for(table.slab, len(pages)) if pages else None
        if tier is not None:
            self.swapper.out(table.slab, pages, tier, (process,))
            return False
        self.release(process)
        return True

    def _alone(self, page: Page) -> bool:
        """Whether its frame holds nothing but cached pages."""
        assert page.number is not None
        frame = page.number // page.slab.slots
        return not page.slab.held[frame]

    # -- moves -------------------------------------------------------------------------------------------------------

    def move_out(self, pages: Sequence[Page], processes: Iterable[Process]) -> None:
        """Move pages to other places: their frames are being cleared. No batch is in flight, and there is room."""
        moving = {id(page) for page in pages}
        by_slab: dict[Slab, list[Page]] = {}
        for page in pages:
            by_slab.setdefault(page.slab, []).append(page)
        concerned = [p for p in processes if p.table and any(id(page) in moving for page in p.table.pages)]
        for slab, group in by_slab.items():
            held = tuple(group)
            for page in held:
                slab.hold(page)  # for the reservation; the flight holds it too
            places = []
            for page in held:
                place = slab.reserve(page)
                assert place is not None, "move_out was called without room"
                places.append(place)
            moves = tuple(
                Move(source=page.number, target=place)
                for page, place in zip(held, places, strict=True)
                if page.number is not None
            )
            self._flights.start(
                ev.Copy(self._flights.next_id(), slab.model, moves),
                tuple(p for p in concerned if p.table and p.table.slab is slab),
                held,
                tuple(places),
            )
            for page in held:
                slab.unhold(page)

    # -- landings ----------------------------------------------------------------------------------------------------

    def landed(self, flight: Flight, event: ev.Completed) -> list[Page]:
        """A copy, swap or demotion has landed. Returns the pages whose contents are lost."""
        failed = event.error is not None
        lost: list[Page] = []
        match flight.operation:
            case ev.Copy():
                for page, place in zip(flight.pages, flight.places, strict=False):
                    if failed:
                        page.slab.cancel(place)
                    else:
                        page.slab.moved(page, place)
            case ev.SwapOut(slots=slots, tier=tier):
                if failed:
                    self._not_swapped_out(flight, slots)
                else:
                    self.swapper.out_landed(flight, slots, tier)
            case ev.SwapIn(slots=slots):
                lost = self.swapper.back_landed(flight, slots, None if failed else event.result)
            case ev.Demote(slots=slots):
                self.swapper.swap.end_demotion(slots, moved=not failed)
        for page in flight.pages:
            self.let_go(page)
        return lost

    def _not_swapped_out(self, flight: Flight, slots: tuple[int, ...]) -> None:
        """Whoever needs the room does not wait for another try: these pages will be computed again."""
        self.swapper.swap.release(slots)
        for page in flight.pages:
            if page.cached:
                self.cache.remove(page)
        for process in flight.processes:
            if not process.flights:
                self.release(process)

    def uncopied(self, process: Process) -> None:
        """The copy that it was to write on has failed: there is nothing on it."""
        assert process.table is not None
        process.computed -= process.computed % process.table.slab.page_tokens

    def truncate(self, process: Process, lost: Iterable[Page]) -> None:
        """Pages of this process are lost: it computes again from the first of them on."""
        table = process.table
        gone = {id(page) for page in lost}
        index = next((i for i, page in enumerate(table.pages) if id(page) in gone), None) if table else None
        if table is None or index is None:
            return
        for page in table.cut(index):
            self.let_go(page)
        process.recede(index * table.slab.page_tokens)
        if process.active and self.room_for(table.slab, table.shortage(process.computed, len(process.tokens))):
            self.add_pages(process, len(process.tokens))  # it keeps the room that it was given


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of what two sequences begin with alike."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
