"""The ledger of one device: every byte of weights, workspace and KV is claimed here first. Numbers only, no tensors.

    frames   | w w w w w w | w w | . . . . . . . . . . . . | p p | q | p |
             ^ extents grow upwards                          slabs grow downwards ^

A frame is free, or part of an *extent* (contiguous, one owner), or belongs to the *slab* of one model, which cuts it
into pages of equal size (`slab.py`). Pages can move, so scattered free frames are no dead end: an extent is claimed
over frames that hold pages, and is whole when they have moved out.

    free + extents + held + cached + slack = total
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from msgspec import Struct

from llm_os.kernel.driver import Extent
from llm_os.kernel.slab import Page, Slab

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


class Memory:
    """One budget, cut into frames."""

    def __init__(self, total_bytes: int, frame_size: int) -> None:
        self.frame_size = frame_size
        self.frames = total_bytes // frame_size
        self._state = bytearray(self.frames)
        self.free_frames = self.frames
        self.slabs: dict[str, Slab] = {}
        self._extents: dict[str, tuple[Extent, ...]] = {}
        self._counted: tuple[dict[str, tuple[Extent, ...]], Set[int]] = {}, frozenset()  # extents, and their frames
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
        frames = self._recount_extents()
        clearing = self._clearing.keys()
        if clearing:
            assert clearing <= frames, "a frame is cleared for nobody"
            frames = frames - clearing  # their slabs count them, until they are empty
        count = len(frames)
        for slab in self.slabs.values():
            slab.check(clearing)
            frames = frames | slab.used.keys()
            count += len(slab.used)
        assert len(frames) == count, "a frame has two owners"
        assert count + self.free_frames == self.frames, "a frame has no owner"

    def _recount_extents(self) -> Set[int]:
        """Their frames, counted again only when the extents are not those that were counted last."""
        if self._counted[0] != self._extents:
            extents = [extent for owned in self._extents.values() for extent in owned]
            frames = frozenset(f for extent in extents for f in range(extent.frame, extent.frame + extent.frames))
            assert len(frames) == self.extent_frames, "two extents overlap"
            self._counted = dict(self._extents), frames
        return self._counted[1]

    def _mark(self, extents: Iterable[Extent], state: int) -> None:
        for extent in extents:
            was = self._state[extent.frame : extent.frame + extent.frames]
            self._state[extent.frame : extent.frame + extent.frames] = bytes([state]) * extent.frames
            self.free_frames += (extent.frames if state == _FREE else 0) - was.count(_FREE)
