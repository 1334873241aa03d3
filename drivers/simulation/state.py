"""The disk and the host memory of the simulated machine: the real journal and the real swap store, on files that fail.

Remembers what was stored where, and insists that it comes back as it was or not at all. Knows no processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from llm_os.drivers.persistence import FileLog, SlotStore
from llm_os.drivers.simulation.chooser import Chooser
from llm_os.drivers.simulation.device import Device
from llm_os.drivers.simulation.disk import PowerOff, SimFile, SimFiles
from llm_os.drivers.simulation.faults import Faults
from llm_os.drivers.simulation.fences import Fences
from llm_os.drivers.simulation.plan import STATE
from llm_os.drivers.simulation.violation import insist
from llm_os.kernel import events as ev
from llm_os.kernel.config import Config, parse_bytes
from llm_os.kernel.errors import StoreError
from llm_os.kernel.journal import Session

_ATTEMPTS = 50  # at opening on a disk that fails


class FlippingStore(SlotStore):
    """A swap store whose contents can be damaged."""

    def flip(self, slot: int, bit: int) -> None:
        place = self._slots[slot].place
        if isinstance(place, bytes):
            damaged = bytearray(place)
            damaged[bit // 8 % len(damaged)] ^= 1 << bit % 8
            self._slots[slot] = self._slots[slot]._replace(place=bytes(damaged))
        elif isinstance(self._file, SimFile):
            self._file.contents[place.offset + bit // 8 % place.size] ^= 1 << bit % 8


class State:
    """What is beside the device. `boot` after a crash, too."""

    def __init__(self, config: Config, faults: Faults, chooser: Chooser) -> None:
        self._config = config
        self._faults = faults
        self._chooser = chooser
        self._disk = SimFiles(faults, chooser)
        self._caps = {tier: parse_bytes(tier, getattr(config, f"swap_{tier}")) for tier in ("host", "disk")}
        self.log: FileLog | None = None
        self._last_slot = 0

    def boot(self, device: Device, fences: Fences) -> dict[int, Session]:
        """Open what is on the disk, as an operator does who tries again. Returns the sessions of the journal."""
        self._device, self._fences = device, fences
        self._slots: dict[int, tuple[bytes, str, int, int]] = {}  # contents, tier, page bytes, salt
        self._last_slot = 0
        for attempt in range(_ATTEMPTS + 1):
            self._faults.pause(attempt == _ATTEMPTS)
            try:
                self._store = FlippingStore(STATE if self._caps["disk"] else None, files=self._disk)
                if self._config.state is None:
                    return {}
                if self.log is not None:
                    self.log.close()
                self.log = FileLog(STATE, self._disk, compact_above=2000)
                return self.log.sessions
            except StoreError:
                continue
            finally:
                self._faults.pause(False)
        raise AssertionError("a disk without faults fails")

    def crash(self, writing: Sequence[ev.Journal]) -> None:
        """The program dies, maybe while it writes these."""
        self._disk.power = self._chooser.below(4)
        with suppress(PowerOff, StoreError):
            for operation in writing:
                self.append(operation)
        self._disk.power = self.log = None
        self._disk.crash()

    def sessions(self) -> dict[int, Session]:
        """What the journal would give back now, if the program ended in good order."""
        if self.log is None:
            return {}
        self.log.close()
        self.log = FileLog(STATE, self._disk, compact_above=2000)
        return self.log.sessions

    def append(self, operation: ev.Journal) -> None:
        assert self.log is not None, "a journal without a state directory"
        self.log.append(operation.records)

    def expect(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """The core asks for these to be stored."""
        insist(len(slots) == len(pages) == len({*slots}) and min(slots) > self._last_slot, "swap slot", slots)
        self._last_slot = max(slots)

    def swap(self, operation: ev.SwapOut | ev.SwapIn | ev.Demote) -> tuple[bool, ...] | None:
        match operation:
            case ev.SwapOut():
                self._out(operation)
            case ev.SwapIn():
                return self._back(operation)
            case ev.Demote():
                self._demote(operation)
        return None

    # -- swap ----------------------------------------------------------------------------------------------------------

    def _out(self, operation: ev.SwapOut) -> None:
        model, pages, slots, tier = operation.model, operation.pages, operation.slots, operation.tier
        contents = self._device.swap_out(model, pages).result(0)
        self._store.put(slots, contents, tier)
        for page, slot, content in zip(pages, slots, contents, strict=True):
            self._slots[slot] = (content, tier, self._fences.page_bytes(model), self._fences.salt(model, page))
        self._check_room()

    def _back(self, operation: ev.SwapIn) -> tuple[bool, ...]:
        self._know(operation.slots)
        for slot in operation.slots:
            if self._faults.at("swapped"):
                self._store.flip(slot, self._chooser.below(1 << 16))
        contents = [self._store.get(slot) for slot in operation.slots]
        good = [(page, content) for page, content in zip(operation.pages, contents, strict=True) if content is not None]
        for slot, page, content in zip(operation.slots, operation.pages, contents, strict=True):
            insist(content in (None, self._slots[slot][0]), "swap", f"slot {slot} is not what was stored")
            if content is not None:
                self._fences.write(operation.model, page, self._slots[slot][3])
        pages, found = tuple(page for page, _ in good), tuple(content for _, content in good)
        self._device.swap_in(operation.model, pages, found).result(0)
        return tuple(content is not None for content in contents)

    def _demote(self, operation: ev.Demote) -> None:
        self._know(operation.slots)
        self._store.demote(operation.slots)
        for slot in operation.slots:
            content, _, size, salt = self._slots[slot]
            self._slots[slot] = (content, "disk", size, salt)
        self._check_room()

    def discard(self, slots: Sequence[int]) -> None:
        self._store.discard(slots)
        for slot in slots:
            self._slots.pop(slot, None)

    def check(self) -> None:
        """At the end nothing is left."""
        self._store.check()
        insist(not self._slots, "baseline", f"swap slots {sorted(self._slots)} are kept by nobody")

    def _know(self, slots: Sequence[int]) -> None:
        insist(all(slot in self._slots for slot in slots), "swap slot", f"one of {slots} was never stored or is gone")

    def _check_room(self) -> None:
        for tier, cap in self._caps.items():
            used = sum(size for _, where, size, _ in self._slots.values() if where == tier)
            insist(used <= cap, "swap room", f"{used} bytes in {tier}, {cap} are allowed")
