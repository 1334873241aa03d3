"""KV pages on the device: the slab of frames that one model's pages are cut from. Numbers only, no tensors.

    frame      |      7      |      8      |            page number = frame * slots + slot
    slots      | 0 | 1 | 2 | | 0 | 1 | 2 | |            per model: a driver finds a page by arithmetic

A page is *held* while a page table or an operation in flight needs it, and *cached* when only the prefix cache knows
it: whoever needs room may take it. A frame whose pages are all cached is as good as free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_os.kernel.memory import Memory


class Page:
    """The KV of some tokens of one model, wherever it lies. Tables point to it, so that it can move."""

    __slots__ = ("busy", "cached", "key", "number", "references", "rent", "rested", "slab", "slot", "tokens", "uses")

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
        self.rested = 0  # the number of its last entry there


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
        self._free: dict[int, list[int]] = {}  # frame -> free page numbers, if it has any and is open
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
            self._free[frame] = [*reversed(self._numbers(frame))]
            self._free_slots += self.slots
        free = self._free[frame]
        number = free.pop()
        self._free_slots -= 1
        if not free:
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
        return [self.pages[number] for number in self._numbers(frame) if number in self.pages]

    def close_frame(self, frame: int) -> None:
        self._closed_frames += 1
        self._free_slots -= len(self._free.pop(frame, ()))
        self._held_open -= self.held[frame]
        self._frames_held -= self.held[frame] > 0

    def open_frame(self, frame: int) -> None:
        self._closed_frames -= 1
        free = [number for number in reversed(self._numbers(frame)) if number not in self.pages]
        if free:
            self._free[frame] = free
            self._free_slots += len(free)
        self._held_open += self.held[frame]
        self._frames_held += self.held[frame] > 0

    def _numbers(self, frame: int) -> range:
        """Of the pages in a frame."""
        return range(frame * self.slots, (frame + 1) * self.slots)

    def _hold(self, frame: int, change: int) -> None:
        before = self.held[frame]
        self.held[frame] = before + change
        if not self.memory.is_clearing(frame):
            self._held_open += change
            self._frames_held += (before + change > 0) - (before > 0)

    def _vacate(self, number: int, held: bool) -> None:
        frame = number // self.slots
        closed = self.memory.is_clearing(frame)
        if held:
            self._hold(frame, -1)
        self.used[frame] -= 1
        if not closed:
            self._free.setdefault(frame, []).append(number)
            self._free_slots += 1
        if not self.used[frame]:
            del self.used[frame], self.held[frame]
            if closed:
                self._closed_frames -= 1
            else:
                self._free_slots -= len(self._free.pop(frame))
            self.memory.release_frame(frame)

    def check(self, clearing: Collection[int]) -> None:
        """Recounts its pages. `clearing` are the frames of the device that take no more pages."""
        if not self.pages:
            left = (self._closed_frames, self._free_slots, self._held_open, self._frames_held)
            assert not (self.used or self.held or self._free or any(left)), "frames without pages stay with their slab"
            return
        slots = self.slots
        used, held = dict.fromkeys(self.used, 0), dict.fromkeys(self.used, 0)
        for number, page in self.pages.items():
            frame = number // slots
            assert frame in used, "a page lies in a frame that its slab does not have"
            used[frame] += 1
            if page.references:
                held[frame] += 1
            assert page.number == number or page.busy, "a page is not where its slab has it"
        assert used == self.used, "used pages are miscounted"
        assert held == self.held, "held is miscounted"
        closed = frames_held = held_open = free_slots = 0
        for frame, count in used.items():
            if frame in clearing:
                closed += 1
                assert frame not in self._free, "a frame that is being cleared takes pages"
                continue
            if held[frame]:
                frames_held += 1
                held_open += held[frame]
            if count < slots:
                free = self._free.get(frame, ())
                assert len(free) == slots - count, "a slot is lost"
                free_slots += len(free)
        assert closed == self._closed_frames
        assert frames_held == self._frames_held
        assert held_open == self._held_open
        assert free_slots == self._free_slots
        numbers = set().union(*self._free.values())
        assert len(numbers) == free_slots, "a slot is free twice, or in a frame that is not the slab's"
        assert self.pages.keys().isdisjoint(numbers), "a free slot is in use"


def fit_page_tokens(choices: Iterable[int], kv_bytes_per_token: int, frame_size: int) -> int | None:
    """The page size in tokens that wastes the least of a frame; near 16 among equals. None if no page fits."""
    fitting = [tokens for tokens in choices if tokens * kv_bytes_per_token <= frame_size]
    return max(
        fitting,
        key=lambda tokens: (frame_size // (tokens * kv_bytes_per_token) * tokens, -abs(tokens - 16)),
        default=None,
    )
