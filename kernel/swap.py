"""The account of KV that has left the device: host memory first, then disk. Slots and bytes only; a store keeps them.

A slot is a name for one page's contents, never used twice. What a slot holds is checked when it comes back; contents
that are lost or damaged are computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from llm_os.kernel.events import Tier
from llm_os.kernel.slab import Page


class SwapStore(Protocol):
    """Where the contents of slots go. One caller at a time."""

    def put(self, slots: Sequence[int], contents: Sequence[bytes], tier: Tier) -> None:
        """Keep contents under names that were never used before: all, or none and StoreError."""
        ...

    def get(self, slot: int) -> bytes | None:
        """What was put there; None if it is lost, or not what was put."""
        ...

    def demote(self, slots: Sequence[int]) -> None:
        """Move slots from host memory to disk: all, or none and StoreError."""
        ...

    def discard(self, slots: Sequence[int]) -> None: ...

    def close(self) -> None: ...


class Swap:
    """Two tiers with a budget in bytes each."""

    def __init__(self, host_bytes: int, disk_bytes: int) -> None:
        self.capacity: dict[Tier, int] = {"host": host_bytes, "disk": disk_bytes}
        self.used: dict[Tier, int] = {"host": 0, "disk": 0}
        self._slots: dict[int, tuple[Tier, Page]] = {}  # in order of age
        self._last = 0
        self._failed = -1  # the last slot there was when a demotion failed: no other try before the next one

    @property
    def enabled(self) -> bool:
        return any(self.capacity.values())

    def tier_for(self, size: int) -> Tier | None:
        """Where so many bytes fit now: the nearest tier."""
        tiers: tuple[Tier, ...] = ("host", "disk")
        return next((tier for tier in tiers if self.used[tier] + size <= self.capacity[tier]), None)

    def claim(self, pages: Sequence[Page], tier: Tier) -> tuple[int, ...]:
        """Slots for pages that are about to be swapped out. The caller has asked `tier_for`."""
        slots = tuple(range(self._last + 1, self._last + 1 + len(pages)))
        self._last += len(pages)
        for slot, page in zip(slots, pages, strict=True):
            self._slots[slot] = (tier, page)
            self.used[tier] += page.slab.page_bytes
        assert self.used[tier] <= self.capacity[tier]
        return slots

    def release(self, slots: Iterable[int]) -> None:
        for slot in slots:
            tier, page = self._slots.pop(slot)
            self.used[tier] -= page.slab.page_bytes

    def tier(self, slot: int) -> Tier:
        return self._slots[slot][0]

    def surplus(self) -> list[Page]:
        """The oldest pages in host memory, when it is nearly full and the disk has room for them: a quarter of it."""
        if self.used["host"] * 8 <= self.capacity["host"] * 7 or self._failed == self._last:
            return []
        room = min(self.capacity["disk"] - self.used["disk"], self.capacity["host"] // 4)
        found = []
        for slot, (tier, page) in self._slots.items():
            if tier == "host" and not page.busy and page.slot == slot:
                room -= page.slab.page_bytes
                if room < 0:
                    break
                found.append(page)
        return found

    def begin_demotion(self, pages: Iterable[Page]) -> None:
        """Claim their room on disk; they keep that in host memory until `end_demotion`."""
        self.used["disk"] += sum(page.slab.page_bytes for page in pages)
        assert self.used["disk"] <= self.capacity["disk"]

    def end_demotion(self, slots: Iterable[int], moved: bool) -> None:
        if not moved:
            self._failed = self._last
        for slot in slots:
            _, page = self._slots[slot]
            if moved:
                self._slots[slot] = ("disk", page)
            self.used["host" if moved else "disk"] -= page.slab.page_bytes

    def check(self, pages: dict[int, Page], demoting: int) -> None:
        """`pages` are those that have a slot or are getting one; `demoting` the bytes that are in both tiers now."""
        assert self._slots.keys() == pages.keys(), "a slot is lost, or nobody's"
        used: dict[Tier, int] = {"host": 0, "disk": demoting}
        for slot, (tier, page) in self._slots.items():
            assert pages[slot] is page, "a slot is another page's"
            used[tier] += page.slab.page_bytes
        assert used == self.used, "swap is miscounted"
        assert used["host"] <= self.capacity["host"] and used["disk"] <= self.capacity["disk"]
