"""The ledger of one device: every byte of weights, workspace and KV is claimed here first. Numbers only, no tensors.

    frames   | w w w w w w | w w | . . . . . . . . . . . . | p p | q | p |
             ^ extents grow upwards                          slabs grow downwards ^

A frame is free, or part of an *extent* (contiguous, one owner), or belongs to the *slab* of one model, which cuts it
into pages of equal size. Page numbers are per model: frame * slots + slot, so a driver finds a page by arithmetic.

A page is *held* while a page table or an operation in flight needs it, and *cached* when only the prefix cache knows
it: whoever needs room may take it. A frame whose pages are all cached is as good as free.

    free + extents + held + cached + slack = total
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import Struct

from llm_os.kernel.driver import Extent

_FREE, _EXTENT, _SLAB = 0, 1, 2


class MemoryInfo(Struct, frozen=True, kw_only=True):
    """A snapshot of the ledger, in bytes. total = free + weights + workspace + kv + cached + slack."""

    total: int
    free: int
    weights: int
    workspace: int
    kv: int  # pages that a process or an operation in flight needs
    cached: int  # pages that nobody needs now, kept for a prompt that begins alike
    slack: int  # free pages in frames that a slab holds
    host: int = 0  # KV swapped to host memory
    disk: int = 0  # KV swapped to disk
    driver: int = 0  # what the driver says that it has really allocated


class Page:
    """The KV of some tokens of one model, wherever it lies. Tables point to it, so that it can move."""

    __slots__ = ("busy", "cached", "key", "number", "references", "rent", "slab", "slot", "tokens", "uses")

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.number: int | None = None  # its place on the device
        self.slot: int | None = None  # its place in swap, when it has none on the device
        self.references = 0  # tables that map it, and operations in flight that need it as it is
        self.busy = 0  # copies and swaps in flight that name it: it stays where it is until they have landed
        self.key: bytes | None = None  # what it holds, by content; set once it is full
        self.tokens: tuple[int, ...] = ()  # of a tail in the prefix cache: what it holds
        self.cached = False  # listed in the prefix cache
        self.uses = 0  # how often the prefix cache gave it out
        self.rent = 0.0  # its place in the order of eviction


class Memory:
    """One budget, cut into frames."""

    def __init__(self, total_bytes: int, frame_size: int) -> None:
        self.frame_size = frame_size
        self.frames = total_bytes // frame_size
        self._state = bytearray(self.frames)
        self.free_frames = self.frames
        self.slabs: dict[str, Slab] = {}
        self._extents: dict[str, tuple[Extent, ...]] = {}
        self._clearing: dict[int, str] = {}  # frames of an extent that still hold pages, which are moving out

    def frames_for(self, size: int) -> int:
        return -(-size // self.frame_size)

    @property
    def reclaimable(self) -> int:
        """Frames that hold nothing but cached pages."""
        return sum(slab.reclaimable for slab in self.slabs.values())

    # -- extents -----------------------------------------------------------------------------------------------------

    def claim_extents(self, owner: str, sizes: Sequence[int]) -> tuple[Extent, ...] | None:
        """One contiguous run of free frames per size in bytes, all or nothing."""
        taken: list[Extent] = []
        for size in sizes:
            count = self.frames_for(size)
            start = self._state.find(bytes(count))
            if start < 0:
                self._mark(taken, _FREE)
                return None
            taken.append(Extent(start, count))
            self._mark(taken[-1:], _EXTENT)
        self._extents[owner] = tuple(taken)
        return self._extents[owner]

    def claim_clearing(self, owner: str, sizes: Sequence[int]) -> tuple[tuple[Extent, ...], list[Page]] | None:
        """Extents over frames that may hold pages, and those pages: the caller moves them out at once, and the extents
        are whole when `clear(owner)` says so. As few pages as can be; none that is busy. None if there is no way.

        The caller has seen to it that there are as many free frames as are needed: so there is a place for each page.
        """
        taken: list[Extent] = []
        for size in sorted(sizes, reverse=True):
            count = self.frames_for(size)
            start = self._cheapest(count)
            if start is None:
                self._unclaim(taken)
                return None
            extent = Extent(start, count)
            for frame in range(start, start + count):
                if self._state[frame] == _SLAB:
                    self._clearing[frame] = owner
                    self._slab_of(frame).close_frame(frame)
                else:
                    self._mark([Extent(frame, 1)], _EXTENT)
            taken.append(extent)
        by_size = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        placed = dict(zip(by_size, taken, strict=True))
        self._extents[owner] = tuple(placed[i] for i in range(len(sizes)))
        pages = [page for frame in self._clearing_of(owner) for page in self._slab_of(frame).pages_in(frame)]
        return self._extents[owner], pages

    def is_clearing(self, frame: int) -> bool:
        return frame in self._clearing

    def clear(self, owner: str) -> bool:
        """Whether no page is left in the owner's extents."""
        return not self._clearing_of(owner)

    def release_extents(self, owner: str) -> None:
        self._unclaim(self._extents.pop(owner))

    @property
    def extent_frames(self) -> int:
        return sum(extent.frames for extents in self._extents.values() for extent in extents)

    def extents_of(self, owner: str) -> tuple[Extent, ...]:
        return self._extents.get(owner, ())

    def _unclaim(self, extents: Iterable[Extent]) -> None:
        for extent in extents:
            for frame in range(extent.frame, extent.frame + extent.frames):
                if self._clearing.pop(frame, None) is not None:
                    self._slab_of(frame).open_frame(frame)
                else:
                    self._mark([Extent(frame, 1)], _FREE)

    def _cheapest(self, count: int) -> int | None:
        """Where a run of frames without extents holds the fewest pages; the lowest such place."""
        blocked = self.frames * 1000
        cost = []
        pages_in = {frame: slab for slab in self.slabs.values() for frame in slab.used}
        for frame in range(self.frames):
            if self._state[frame] == _FREE:
                cost.append(0)
            elif self._state[frame] == _SLAB and frame not in self._clearing:
                pages = pages_in[frame].pages_in(frame)
                cost.append(blocked if any(page.busy for page in pages) else 1 + len(pages))
            else:
                cost.append(blocked)
        best, least = None, blocked
        total = sum(cost[:count])
        for start in range(self.frames - count + 1):
            if total < least:
                best, least = start, total
            total += (cost[start + count] if start + count < self.frames else 0) - cost[start]
        return best

    def _clearing_of(self, owner: str) -> list[int]:
        return [frame for frame, who in self._clearing.items() if who == owner]

    def _slab_of(self, frame: int) -> Slab:
        return next(slab for slab in self.slabs.values() if frame in slab.used)

    # -- slabs -------------------------------------------------------------------------------------------------------

    def open_slab(self, slab: Slab) -> None:
        """From now on it may hold frames."""
        self.slabs[slab.model] = slab

    def close_slab(self, slab: Slab) -> None:
        """It must be empty on the device."""
        assert not slab.used, f"{slab.model} still has pages in {len(slab.used)} frames"
        del self.slabs[slab.model]

    def claim_frame(self) -> int | None:
        """A single frame for a slab, from the top; None when there is none."""
        frame = self._state.rfind(_FREE)
        if frame < 0:
            return None
        self._mark([Extent(frame, 1)], _SLAB)
        return frame

    def release_frame(self, frame: int) -> None:
        """From a slab: to the extent that waits for it, or to all."""
        waiting = self._clearing.pop(frame, None)
        self._mark([Extent(frame, 1)], _FREE if waiting is None else _EXTENT)

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def info(self, workspace: Iterable[Extent]) -> MemoryInfo:
        """`workspace` are the extents that hold scratch; all others hold weights."""
        scratch = sum(extent.frames for extent in workspace)
        slabs = self.slabs.values()
        slab_frames = sum(len(slab.used) for slab in slabs)
        kv = sum(sum(slab.held.values()) * slab.page_bytes for slab in slabs)
        cached = sum(len(slab.pages) * slab.page_bytes for slab in slabs) - kv
        return MemoryInfo(
            total=self.frames * self.frame_size,
            free=self.free_frames * self.frame_size,
            weights=(self.extent_frames - scratch - len(self._clearing)) * self.frame_size,
            workspace=scratch * self.frame_size,
            kv=kv,
            cached=cached,
            slack=slab_frames * self.frame_size - kv - cached,
        )

    def check(self) -> None:
        """Recounts everything. Raises AssertionError."""
        assert self._state.count(_FREE) == self.free_frames, "free frames are miscounted"
        frames = Counter(
            f
            for owned in self._extents.values()
            for extent in owned
            for f in range(extent.frame, extent.frame + extent.frames)
        )
        assert all(count == 1 for count in frames.values()), "two extents overlap"
        for frame in self._clearing:
            assert frames[frame] == 1, "a frame is cleared for nobody"
            del frames[frame]  # its slab counts it, until it is empty
        for slab in self.slabs.values():
            slab.check(self._clearing.keys())
            frames.update(slab.used.keys())
        assert all(count == 1 for count in frames.values()), "a frame has two owners"
        assert len(frames) + self.free_frames == self.frames, "a frame has no owner"

    def _mark(self, extents: Iterable[Extent], state: int) -> None:
        for extent in extents:
            was = self._state[extent.frame : extent.frame + extent.frames]
            self._state[extent.frame : extent.frame + extent.frames] = bytes([state]) * extent.frames
            self.free_frames += (extent.frames if state == _FREE else 0) - was.count(_FREE)


class Slab:
    """The KV pages of one model on the device: equal slices of frames."""

    def __init__(self, memory: Memory, model: str, page_tokens: int, page_bytes: int) -> None:
        self.memory = memory
        self.model = model
        self.page_tokens = page_tokens
        self.page_bytes = page_bytes
        self.slots = memory.frame_size // page_bytes  # pages in a frame
        self.pages: dict[int, Page] = {}  # by number
        self.used: dict[int, int] = {}  # frame -> its pages
        self.held: dict[int, int] = {}  # frame -> its pages that somebody needs
        self.worth = 0.0  # seconds of computing that a byte of its KV saves
        self.moves = 0  # how often a page of this slab has changed its place
        self._closed_frames = 0  # frames that take no more pages: they are being cleared
        self._free: dict[int, list[int]] = {}  # frame -> free slots, if it has any and is open
        self._free_slots = 0
        self._held_open = 0  # held pages, and
        self._frames_held = 0  # frames with any, of those that are open

    def frames_for(self, tokens: int) -> int:
        """Frames that the KV of so many tokens takes."""
        return -(-tokens // (self.page_tokens * self.slots))

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    @property
    def reclaimable(self) -> int:
        """Open frames that hold nothing but cached pages."""
        return len(self.used) - self._closed_frames - self._frames_held

    def reclaimable_frames(self) -> list[int]:
        return [f for f, held in self.held.items() if not held and not self.memory.is_clearing(f)]

    @property
    def available(self) -> int:
        """Pages that can be placed now."""
        return self._free_slots + self.memory.free_frames * self.slots

    @property
    def potential(self) -> int:
        """Pages that could be placed if every cached page in the way were evicted."""
        memory = self.memory
        own = self._frames_held * self.slots - self._held_open
        return own + (memory.free_frames + memory.reclaimable) * self.slots

    def place(self, page: Page) -> bool:
        """Give a held page a place on the device. False when memory is full."""
        assert page.references and page.number is None
        number = self.reserve(page)
        page.number = number
        return number is not None

    def reserve(self, page: Page) -> int | None:
        """A second place for a held page that is about to be moved there. None when memory is full."""
        frame = next(iter(self._free), None)
        if frame is None:
            frame = self.memory.claim_frame()
            if frame is None:
                return None
            self.used[frame] = self.held[frame] = 0
            self._free[frame] = list(reversed(range(self.slots)))
            self._free_slots += self.slots
        slots = self._free[frame]
        number = frame * self.slots + slots.pop()
        self._free_slots -= 1
        if not slots:
            del self._free[frame]
        self.used[frame] += 1
        self.pages[number] = page
        self._hold(frame, 1)
        return number

    def moved(self, page: Page, number: int) -> None:
        """A held page has been copied to the place that was reserved for it: the one before is free."""
        assert page.references and page.number is not None
        before, page.number = page.number, number
        self.cancel(before)
        self.moves += 1

    def cancel(self, number: int) -> None:
        """Free a place that was held: one of the two of a held page."""
        del self.pages[number]
        self._vacate(number, True)

    def vacate(self, page: Page) -> None:
        """Take a page from its place."""
        number = page.number
        assert number is not None
        page.number = None
        del self.pages[number]
        if held := page.references > 0:
            self.moves += 1
        self._vacate(number, held)

    def hold(self, page: Page) -> None:
        page.references += 1
        if page.references == 1 and page.number is not None:
            self._hold(page.number // self.slots, 1)

    def unhold(self, page: Page) -> None:
        """One reference less. A page without any is the caller's to vacate or to keep as cached."""
        assert page.references > 0
        page.references -= 1
        if page.references == 0 and page.number is not None:
            self._hold(page.number // self.slots, -1)

    def pages_in(self, frame: int) -> list[Page]:
        numbers = range(frame * self.slots, (frame + 1) * self.slots)
        return [self.pages[number] for number in numbers if number in self.pages]

    def close_frame(self, frame: int) -> None:
        self._closed_frames += 1
        self._free_slots -= len(self._free.pop(frame, ()))
        self._held_open -= self.held[frame]
        self._frames_held -= self.held[frame] > 0

    def open_frame(self, frame: int) -> None:
        self._closed_frames -= 1
        used = {number % self.slots for number in self.pages if number // self.slots == frame}
        free = [slot for slot in reversed(range(self.slots)) if slot not in used]
        if free:
            self._free[frame] = free
            self._free_slots += len(free)
        self._held_open += self.held[frame]
        self._frames_held += self.held[frame] > 0

    def _hold(self, frame: int, change: int) -> None:
        before = self.held[frame]
        self.held[frame] = before + change
        if not self.memory.is_clearing(frame):
            self._held_open += change
            self._frames_held += (before + change > 0) - (before > 0)

    def _vacate(self, number: int, held: bool) -> None:
        frame, slot = divmod(number, self.slots)
        closed = self.memory.is_clearing(frame)
        if held:
            self._hold(frame, -1)
        self.used[frame] -= 1
        if not closed:
            self._free.setdefault(frame, []).append(slot)
            self._free_slots += 1
        if not self.used[frame]:
            del self.used[frame], self.held[frame]
            if closed:
                self._closed_frames -= 1
            else:
                self._free_slots -= len(self._free.pop(frame))
            self.memory.release_frame(frame)

    def check(self, clearing: Iterable[int]) -> None:
        closed = set(clearing) & self.used.keys()
        used, held = Counter[int](), Counter[int]()
        for number, page in self.pages.items():
            used[number // self.slots] += 1
            held[number // self.slots] += page.references > 0
            assert page.number == number or page.busy, "a page is not where its slab has it"
        assert used == self.used, "used pages are miscounted"
        assert {f: n for f, n in self.held.items() if n} == {f: n for f, n in held.items() if n}, "held is miscounted"
        assert len(closed) == self._closed_frames
        assert self._frames_held == sum(held[f] > 0 for f in self.used if f not in closed)
        assert self._held_open == sum(held[f] for f in self.used if f not in closed)
        assert self._free_slots == sum(map(len, self._free.values()))
        for frame, count in self.used.items():
            free = self._free.get(frame, [])
            if frame in closed:
                assert not free, "a frame that is being cleared takes pages"
            else:
                assert len(free) == len(set(free)) and len(free) + count == self.slots, "a slot is lost"
                assert not any(frame * self.slots + slot in self.pages for slot in free), "a free slot is in use"


def fit_page_tokens(choices: Iterable[int], kv_bytes_per_token: int, frame_size: int) -> int | None:
    """The page size in tokens that wastes the least of a frame; near 16 among equals. None if no page fits."""
    fitting = [tokens for tokens in choices if tokens * kv_bytes_per_token <= frame_size]
    return max(
        fitting,
        key=lambda tokens: (frame_size // (tokens * kv_bytes_per_token) * tokens, -abs(tokens - 16)),
        default=None,
    )
