"""Keeps the contents of pages that left the device, in host memory or on disk, under slot numbers, for one boot.

    put ──> host ── demote ──> disk        get: what was put, bit for bit, or None
    put ──────────────────────> disk

Contents are opaque. Their checksums stay in memory, so nothing that lies on a disk is believed. Nothing is meant to
survive: the file has no name as soon as it is open, where the system allows that. Limits are the kernel's business.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from llm_os.drivers.persistence.cipher import Cipher
from llm_os.drivers.persistence.extents import Extents
from llm_os.drivers.persistence.files import File, Files, LocalFiles, write_all
from llm_os.kernel.errors import StoreError
from llm_os.kernel.events import Tier


class _Cell(NamedTuple):
    """Where on the disk."""

    offset: int
    size: int


class _Slot(NamedTuple):
    digest: bytes
    place: bytes | _Cell


class SlotStore:
    """Slots in host memory, and on disk if there is a folder. May be called from several threads.

    Raises StoreError if the file cannot be made. On disk contents are sealed by `cipher`, if there is one.
    """

    def __init__(self, folder: Path | None, cipher: Cipher | None = None, files: Files | None = None) -> None:
        self._cipher, self._files = cipher, files or LocalFiles()
        self._key = os.urandom(32)
        self._state = threading.Lock()  # guards the five below; not held while cells are read and written
        self._slots: dict[int, _Slot] = {}
        self._extents = Extents()
        self._length = 0  # of the file, at most
        self._closed = False
        self._path = folder / "swap" if folder else None
        self._file = self._open(self._path) if self._path else None
        self._named = self._path is not None and not self._unlink(self._path)

    def put(self, slots: Sequence[int], contents: Sequence[bytes], tier: Tier) -> None:
        """Keep contents[i] under slots[i], which are new. All of them, or StoreError and none."""
        digests = [self._digest(slot, content) for slot, content in zip(slots, contents, strict=True)]
        places: Sequence[bytes | _Cell] = contents if tier == "host" else self._write(slots, contents)
        with self._state:
            taken = [slot for slot in slots if slot in self._slots]
            if taken or self._closed:
                self._free(places)
                raise StoreError(f"swap slot {taken[0]} is in use already" if taken else "the swap store is closed")
            self._slots.update(
                (slot, _Slot(digest, place)) for slot, digest, place in zip(slots, digests, places, strict=True)
            )

    def get(self, slot: int) -> bytes | None:
        """What was put there, or None if it is not there, cannot be read, or is not what was put there."""
        with self._state:
            entry = self._slots.get(slot)
        if entry is None:
            return None
        try:
            contents = self._read(slot, entry.place) if isinstance(entry.place, _Cell) else entry.place
        except (OSError, ValueError, StoreError):
            return None
        return contents if self._digest(slot, contents) == entry.digest else None

    def demote(self, slots: Sequence[int]) -> None:
        """Move slots to the disk; those that are there stay. All of them, or StoreError and all stay where they are."""
        with self._state:
            if missing := [slot for slot in slots if slot not in self._slots]:
                raise StoreError(f"swap slot {missing[0]} is not there")
            entries = {slot: self._slots[slot] for slot in slots if isinstance(self._slots[slot].place, bytes)}
        contents = [entry.place for entry in entries.values() if isinstance(entry.place, bytes)]
        cells = self._write(list(entries), contents)
        with self._state:
            for (slot, entry), cell in zip(entries.items(), cells, strict=True):
                if self._slots.get(slot) is entry:
                    self._slots[slot] = _Slot(entry.digest, cell)
                else:  # it was discarded meanwhile
                    self._free([cell])

    def discard(self, slots: Sequence[int]) -> None:
        """Forget them. Slots that are not there are ignored: their put may have failed."""
        with self._state:
            self._free([self._slots.pop(slot).place for slot in slots if slot in self._slots])
            # Not at every discard: blocks that are given back must be found again by the next put.
            end = self._extents.end if 2 * self._extents.end <= self._length else None
            if end is not None and self._file is not None:
                with suppress(OSError):
                    self._file.truncate(end)
                    self._length = end

    def close(self) -> None:
        """Forget everything; the file is gone. Idempotent. Not while another thread reads or writes."""
        with self._state:
            self._slots.clear()
            file, self._file, self._closed = self._file, None, True
        if file is not None:
            with suppress(OSError):
                file.close()
        if self._named and self._path is not None:
            self._named = not self._unlink(self._path)

    def check(self) -> None:
        """Raises AssertionError unless every byte of the file is free or of exactly one slot. Not while others call."""
        with self._state:
            self._extents.check([slot.place for slot in self._slots.values() if isinstance(slot.place, _Cell)])

    def _open(self, path: Path) -> File:
        try:
            self._files.make_folder(path.parent)
            return self._files.create(path)
        except OSError as error:
            raise self._failed(error) from error

    def _unlink(self, path: Path) -> bool:
        try:
            self._files.remove(path)
        except OSError:  # systems that keep the names of open files
            return False
        return True

    def _write(self, slots: Sequence[int], contents: Sequence[bytes]) -> list[_Cell]:
        file, cells = self._file, list[_Cell]()
        if file is None:
            raise StoreError("there is no swap on disk; set the directory for state, or swap to host memory only")
        try:
            for slot, content in zip(slots, contents, strict=True):
                sealed = self._cipher.seal(slot, content) if self._cipher else content
                with self._state:
                    cells.append(_Cell(self._extents.take(len(sealed)), len(sealed)))
                    self._length = max(self._length, self._extents.end)
                write_all(file, cells[-1].offset, sealed)
        except BaseException as error:
            with self._state:
                self._free(cells)
            if isinstance(error, OSError):
                raise self._failed(error) from error
            raise
        return cells

    def _read(self, slot: int, cell: _Cell) -> bytes:
        if (file := self._file) is None:
            raise StoreError("the swap store is closed")
        data = file.read(cell.offset, cell.size)
        while len(data) < cell.size and (more := file.read(cell.offset + len(data), cell.size - len(data))):
            data += more
        return self._cipher.open(slot, data) if self._cipher else data

    def _free(self, places: Sequence[bytes | _Cell]) -> None:
        for place in places:
            if isinstance(place, _Cell):
                self._extents.give(place.offset, place.size)

    def _digest(self, slot: int, contents: bytes) -> bytes:
        digest = hashlib.blake2b(slot.to_bytes(8, "little"), digest_size=16, key=self._key)
        digest.update(contents)
        return digest.digest()

    def _failed(self, error: OSError) -> StoreError:
        why = error.strerror or str(error)
        return StoreError(f"swap to {self._path} failed: {why}; mend the disk, or set swap_disk to 0")
