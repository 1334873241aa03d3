"""A file system that fails, for the journal and the swap store. Bytes in memory; knows nothing of what they mean.

What was written is seen at once by who reads it, and is durable after `sync` (names: after `sync_folder`). `crash`
decides for each write that is not durable whether it was lost, torn, or is there. A failed sync leaves behind writes
that no later sync makes durable, as Linux does (fsyncgate; Rebello et al., ATC 2020).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from llm_os.drivers.simulation.chooser import Chooser
from llm_os.drivers.simulation.faults import Faults

_Change = tuple[int, bytes | None]  # a write at an offset; None cuts the file there


class PowerOff(BaseException):
    """The program ends here, in the middle of a call."""


class SimFile:
    """One file, and whoever has it open: handles share it. Implements `persistence.File`."""

    def __init__(self, disk: SimFiles, faults: Faults, chooser: Chooser) -> None:
        self.contents = bytearray()
        self.durable = bytearray()
        self.pending: list[_Change] = []  # since the last sync, in order
        self.limbo: list[_Change] = []  # a sync of these failed
        self._disk = disk
        self._faults = faults
        self._chooser = chooser

    def size(self) -> int:
        return len(self.contents)

    def read(self, offset: int, size: int) -> bytes:
        if self._faults.call("read"):
            raise OSError(errno.EIO, "read error (simulated)")
        return bytes(self.contents[offset : offset + size])

    def write(self, offset: int, data: bytes | memoryview) -> int:
        self._disk.tick()
        data = bytes(data)
        fault = self._faults.call("write")
        if fault == "disk_full":
            raise OSError(errno.ENOSPC, "no space left (simulated)")
        if fault in ("short_write", "torn_write"):
            data = data[: self._chooser.below(len(data) + 1)]
        elif fault is not None:
            raise OSError(errno.EIO, "write error (simulated)")
        self._change((offset, data))
        if fault == "torn_write":
            raise OSError(errno.EIO, "write error after a part (simulated)")
        return len(data)

    def truncate(self, size: int) -> None:
        self._disk.tick()
        if self._faults.call("write"):
            raise OSError(errno.EIO, "truncate error (simulated)")
        self._change((size, None))

    def sync(self) -> None:
        self._disk.tick()
        if self._faults.call("sync"):
            self.limbo += self.pending
            self.pending = []
            raise OSError(errno.EIO, "sync error (simulated)")
        for change in self.pending:
            _apply(self.durable, change)
        self.pending = []

    def close(self) -> None:
        return

    def crash(self) -> None:
        """The power goes: what is not durable is there, or not, or in part."""
        for offset, data in (*self.limbo, *self.pending):
            fate = self._faults.at("lost")
            if fate == "torn_write" and data is not None:
                data = data[: self._chooser.below(len(data) + 1)]
            if fate != "lost_sync":
                _apply(self.durable, (offset, data))
        self.contents = bytearray(self.durable)
        self.pending, self.limbo = [], []

    def _change(self, change: _Change) -> None:
        self.pending.append(change)
        _apply(self.contents, change)


class SimFiles:
    """Files by path; folders need not be made. Implements `persistence.Files`."""

    def __init__(self, faults: Faults, chooser: Chooser) -> None:
        self._faults = faults
        self._chooser = chooser
        self.names: dict[Path, SimFile] = {}
        self._durable: dict[Path, SimFile] = {}
        self._locked: set[Path] = set()
        self.power: int | None = None  # changes that are still made before it goes off

    def tick(self) -> None:
        """A change is about to be made. Raises PowerOff."""
        if self.power is not None:
            self.power -= 1
            if self.power < 0:
                raise PowerOff

    def make_folder(self, path: Path) -> None:
        return

    def open(self, path: Path) -> SimFile:
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return self.names[path]

    def create(self, path: Path) -> SimFile:
        self.tick()
        if self._faults.call("write"):
            raise OSError(errno.ENOSPC, "no space left (simulated)", str(path))
        self.names[path] = SimFile(self, self._faults, self._chooser)
        return self.names[path]

    def rename(self, old: Path, new: Path) -> None:
        self.tick()
        if self._faults.call("write"):
            raise OSError(errno.EIO, "rename error (simulated)", str(old))
        self.names[new] = self.names.pop(old)

    def remove(self, path: Path) -> None:
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        del self.names[path]

    def sync_folder(self, path: Path) -> None:
        self.tick()
        if self._faults.call("sync"):
            raise OSError(errno.EIO, "sync error (simulated)", str(path))
        self._durable = dict(self.names)

    def lock(self, path: Path) -> Callable[[], None]:
        if path in self._locked:
            raise BlockingIOError(errno.EWOULDBLOCK, "the kernel that runs")
        self._locked.add(path)
        return lambda: self._locked.discard(path)

    def crash(self) -> None:
        """Names that were changed since the last `sync_folder` are all there as they were, or all as they are."""
        if self.names != self._durable and self._faults.at("lost") == "lost_sync":
            self.names = dict(self._durable)
        self._durable = dict(self.names)
        self._locked = set()
        for file in self.names.values():
            file.crash()


def _apply(contents: bytearray, change: _Change) -> None:
    offset, data = change
    if len(contents) < offset:
        contents.extend(bytes(offset - len(contents)))
    if data is None:
        del contents[offset:]
    else:
        contents[offset : offset + len(data)] = data
