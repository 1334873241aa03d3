"""The ledger of one device: every byte of weights, workspace and KV is claimed here first. Numbers only, no tensors.

    frames   | w w w w w w | w w | . . . . . . . . . . . . | p p | q | p |
             ^ extents grow upwards                          slabs grow downwards ^

A frame is free, or part of an *extent* (contiguous, one owner), or belongs to the *slab* of one model, which cuts it
into pages of equal size. Page numbers are per model: frame * slots + slot, so a driver finds a page by arithmetic.

A page lives as long as somebody refers to it: each page table that maps it, and each operation in flight that names
it. The second is the fence: a page freed under a running batch is reused only after the batch has completed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import Struct

from llm_os.kernel.config import show_bytes
from llm_os.kernel.driver import Extent
from llm_os.kernel.errors import Refused

_FREE, _EXTENT, _SLAB = 0, 1, 2


class MemoryInfo(Struct, frozen=True, kw_only=True):
    """A snapshot of the ledger, in bytes. total = free + weights + workspace + kv + slack."""

    total: int
    free: int
    weights: int
    workspace: int
    kv: int  # pages that a process or an operation in flight refers to
    slack: int  # free pages in frames that a slab holds
    driver: int = 0  # what the driver says that it has really allocated


class Memory:
    """One budget, cut into frames."""

    def __init__(self, total_bytes: int, frame_size: int) -> None:
        self.frame_size = frame_size
        self.frames = total_bytes // frame_size
        self._state = bytearray(self.frames)
        self.free_frames = self.frames
        self.slabs: dict[str, Slab] = {}
        self._extents: dict[str, tuple[Extent, ...]] = {}

    def frames_for(self, size: int) -> int:
        return -(-size // self.frame_size)

    def claim_extents(self, owner: str, sizes: Sequence[int]) -> tuple[Extent, ...]:
        """One contiguous run per size in bytes, all or nothing. Raises Refused, naming what is needed and free."""
        taken: list[Extent] = []
        for size in sizes:
            count = self.frames_for(size)
            start = self._state.find(bytes(count))
            if start < 0:
                self._mark(taken, _FREE)
                needed = show_bytes(sum(map(self.frames_for, sizes)) * self.frame_size)
                free, total = (show_bytes(count * self.frame_size) for count in (self.free_frames, self.frames))
                raise Refused(
                    f"{owner} needs {needed} for weights and workspace; {free} of the budget of {total} "
                    "are free; unload a model or raise memory"
                )
            extent = Extent(start, count)
            self._mark([extent], _EXTENT)
            taken.append(extent)
        self._extents[owner] = tuple(taken)
        return tuple(taken)

    @property
    def extent_frames(self) -> int:
        return sum(extent.frames for extents in self._extents.values() for extent in extents)

    def release_extents(self, owner: str) -> None:
        self._mark(self._extents.pop(owner), _FREE)

    def claim_frame(self) -> int | None:
        """A single frame for a slab, from the top; None when there is none."""
        frame = self._state.rfind(_FREE)
        if frame < 0:
            return None
        self._mark([Extent(frame, 1)], _SLAB)
        return frame

    def release_frame(self, frame: int) -> None:
        self._mark([Extent(frame, 1)], _FREE)

    def open_slab(self, model: str, page_tokens: int, page_bytes: int) -> Slab:
        slab = self.slabs[model] = Slab(self, page_tokens, page_bytes)
        return slab

    def close_slab(self, model: str) -> None:
        """The slab must be empty: its model's processes have ended and nothing is in flight."""
        slab = self.slabs.pop(model)
        assert not slab.references, f"{model} still has {len(slab.references)} pages"

    def info(self, workspace: Iterable[Extent]) -> MemoryInfo:
        """`workspace` are the extents that hold scratch; all others hold weights."""
        scratch = sum(extent.frames for extent in workspace)
        weights = self.extent_frames - scratch
        slab_frames = sum(slab.frames for slab in self.slabs.values())
        kv = sum(len(slab.references) * slab.page_bytes for slab in self.slabs.values())
        return MemoryInfo(
            total=self.frames * self.frame_size,
            free=self.free_frames * self.frame_size,
            weights=weights * self.frame_size,
            workspace=scratch * self.frame_size,
            kv=kv,
            slack=slab_frames * self.frame_size - kv,
        )

    def check(self, references: dict[str, Counter[int]]) -> None:
        """Recounts everything. `references` are the pages that tables and operations in flight name, per model."""
        assert self._state.count(_FREE) == self.free_frames
        extents = [extent for owned in self._extents.values() for extent in owned]
        frames = Counter(f for extent in extents for f in range(extent.frame, extent.frame + extent.frames))
        for model, slab in self.slabs.items():
            assert slab.references == references.get(model, Counter()), f"page references of {model} disagree"
            slab.check()
            frames.update(slab.free_slots.keys())
        assert all(count == 1 for count in frames.values()), "a frame has two owners"
        assert len(frames) + self.free_frames == self.frames, "a frame has no owner"

    def _mark(self, extents: Iterable[Extent], state: int) -> None:
        for extent in extents:
            was = self._state[extent.frame : extent.frame + extent.frames]
            self._state[extent.frame : extent.frame + extent.frames] = bytes([state]) * extent.frames
            self.free_frames += (extent.frames if state == _FREE else 0) - was.count(_FREE)


class Slab:
    """The KV pages of one model: equal slices of frames, counted by reference."""

    def __init__(self, memory: Memory, page_tokens: int, page_bytes: int) -> None:
        self.memory = memory
        self.page_tokens = page_tokens
        self.page_bytes = page_bytes
        self.slots = memory.frame_size // page_bytes
        self.free_slots: dict[int, list[int]] = {}  # of every frame that the slab holds
        self.references: Counter[int] = Counter()  # of every page in use

    @property
    def frames(self) -> int:
        return len(self.free_slots)

    @property
    def available(self) -> int:
        """Pages that `allocate` could still give."""
        return sum(map(len, self.free_slots.values())) + self.memory.free_frames * self.slots

    def frames_for(self, tokens: int) -> int:
        """Frames that the KV of so many tokens takes."""
        return -(-tokens // (self.page_tokens * self.slots))

    def allocate(self) -> int | None:
        """A page with one reference, or None when memory is full."""
        frame = next((frame for frame, slots in self.free_slots.items() if slots), None)
        if frame is None:
            frame = self.memory.claim_frame()
            if frame is None:
                return None
            self.free_slots[frame] = list(reversed(range(self.slots)))
        page = frame * self.slots + self.free_slots[frame].pop()
        self.references[page] = 1
        return page

    def retain(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert page in self.references, f"page {page} is free"
            self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference of each; a page without any is free, a frame without pages goes back."""
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                del self.references[page]
                frame, slot = divmod(page, self.slots)
                self.free_slots[frame].append(slot)
                if len(self.free_slots[frame]) == self.slots:
                    del self.free_slots[frame]
                    self.memory.release_frame(frame)

    def check(self) -> None:
        used = Counter(page // self.slots for page in self.references)
        for frame, slots in self.free_slots.items():
            assert len(slots) == len(set(slots)) and len(slots) + used.pop(frame, 0) == self.slots
        assert not used, "a page lies in a frame that the slab does not hold"


def fit_page_tokens(choices: Iterable[int], kv_bytes_per_token: int, frame_size: int) -> int | None:
    """The page size in tokens that wastes the least of a frame; near 16 among equals. None if no page fits."""
    fitting = [tokens for tokens in choices if tokens * kv_bytes_per_token <= frame_size]
    return max(
        fitting,
        key=lambda tokens: (frame_size // (tokens * kv_bytes_per_token) * tokens, -abs(tokens - 16)),
        default=None,
    )
