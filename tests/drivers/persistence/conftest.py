"""A disk in memory: any operation can fail, and a power cut keeps of what was not synced whatever chance decides."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_os.kernel.journal import Began, Done, Given, Record, Took
from llm_os.kernel.request import Request


class PowerCut(BaseException):
    """The program does not live to see the result of an operation."""


class Inode:
    def __init__(self, data: bytes = b"") -> None:
        self.data, self.durable = bytearray(data), bytearray(data)
        self.pending: list[tuple[int, bytes] | int] = []  # writes, and truncations, since the last sync

    def change(self, change: tuple[int, bytes] | int) -> None:
        apply(self.data, change)
        self.pending.append(change)

    def lose(self, chance: random.Random) -> None:
        """Of what was not synced something reaches the disk, whole or torn, and the rest never will."""
        for change in self.pending:
            match chance.randrange(3), change:
                case 0, _:
                    apply(self.durable, change)
                case 1, (int(offset), bytes(data)):
                    apply(self.durable, (offset, data[: chance.randrange(len(data) + 1)]))
        self.pending.clear()


def apply(data: bytearray, change: tuple[int, bytes] | int) -> None:
    offset, written = (change, b"") if isinstance(change, int) else change
    data.extend(bytes(max(0, offset - len(data))))
    if isinstance(change, int):
        del data[change:]
    else:
        data[offset : offset + len(written)] = written


class Handle:
    def __init__(self, disk: Disk, inode: Inode) -> None:
        self.disk, self.inode = disk, inode

    def size(self) -> int:
        self.disk.operate("size")
        return len(self.inode.data)

    def read(self, offset: int, size: int) -> bytes:
        fault = self.disk.operate("read")
        return bytes(self.inode.data[offset : offset + (size + 1) // 2 if fault == "short" else offset + size])

    def write(self, offset: int, data: bytes | memoryview) -> int:
        with_fault = self.disk.operate("write")
        done = bytes(data[: len(data) // 2 if with_fault == "short" else len(data)])
        if done:
            self.inode.change((offset, done))
        self.disk.settle(with_fault)
        return len(done)

    def truncate(self, size: int) -> None:
        fault = self.disk.operate("truncate")
        self.inode.change(size)
        self.disk.settle(fault)

    def sync(self) -> None:
        try:
            fault = self.disk.operate("sync")
        except OSError:
            self.inode.lose(self.disk.chance)  # fsyncgate: the next sync says nothing of what this one lost
            raise
        for change in self.inode.pending:
            apply(self.inode.durable, change)
        self.inode.pending.clear()
        self.disk.settle(fault)

    def close(self) -> None:
        self.disk.operate("close")


class Disk:
    """A Files. `faults` maps the number of an operation to what happens there:

    EIO, ENOSPC   it fails and does nothing (a failed sync loses data, though)
    late          it fails after it has done its work
    short         a read or write does half; no space is left for the next operation
    dead          it fails, and so does everything after it, until `heal`
    cut           the power goes, before it; `late cut`: after it
    """

    def __init__(self, faults: dict[int, str] | None = None, seed: int = 0) -> None:
        self.faults, self.chance = dict(faults or {}), random.Random(seed)
        self.count, self.hit, self.log = 0, False, list[str]()
        self.names: dict[Path, Inode] = {}
        self.durable_names: list[dict[Path, Inode]] = [{}]  # the last one synced, and those since
        self.locked: set[Path] = set()
        self.dead: BaseException | None = None

    def operate(self, name: str) -> str | None:
        """Raises, or returns the fault that is to come."""
        number, self.count = self.count, self.count + 1
        self.log.append(name)
        if self.dead:
            raise self.dead
        fault = self.faults.get(number)
        self.hit = self.hit or fault is not None
        match fault:
            case "EIO" | "ENOSPC":
                raise OSError(getattr(errno, fault), f"injected {fault}")
            case "short":
                if name in ("write", "read"):
                    self.faults[number + 1] = "ENOSPC"
                else:
                    raise OSError(errno.ENOSPC, "injected ENOSPC")
            case "dead":
                self.dead = OSError(errno.EIO, "injected death of the disk")
                raise self.dead
            case "cut":
                self.dead = PowerCut()
                raise self.dead
        return fault

    def settle(self, fault: str | None) -> None:
        if fault == "late":
            raise OSError(errno.EIO, "injected EIO after the fact")
        if fault == "late cut":
            self.dead = PowerCut()
            raise self.dead

    def heal(self) -> None:
        self.faults, self.dead = {}, None

    def after_power_cut(self) -> Disk:
        """What the next boot finds."""
        disk = Disk(seed=self.chance.randrange(2**32))
        for path, inode in self.chance.choice(self.durable_names).items():
            inode.lose(self.chance)
            disk.names[path] = Inode(bytes(inode.durable))
        disk.durable_names = [dict(disk.names)]
        return disk

    def after_kill(self) -> Disk:
        """The program died, the system did not: what was written is there, synced or not."""
        self.heal()
        self.locked.clear()
        return self

    def make_folder(self, path: Path) -> None:
        self.operate("make_folder")

    def open(self, path: Path) -> Handle:
        self.operate("open")
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        return Handle(self, self.names[path])

    def create(self, path: Path) -> Handle:
        fault = self.operate("create")
        self._name({**self.names, path: Inode()})
        self.settle(fault)
        return Handle(self, self.names[path])

    def rename(self, old: Path, new: Path) -> None:
        fault = self.operate("rename")
        names = dict(self.names)
        names[new] = names.pop(old)
        self._name(names)
        self.settle(fault)

    def remove(self, path: Path) -> None:
        fault = self.operate("remove")
        self._name({name: inode for name, inode in self.names.items() if name != path})
        self.settle(fault)

    def sync_folder(self, path: Path) -> None:
        try:
            fault = self.operate("sync_folder")
        except OSError:
            self.durable_names = [self.chance.choice(self.durable_names)]
            raise
        self.durable_names = [self.names]
        self.settle(fault)

    def lock(self, path: Path) -> Callable[[], None]:
        self.operate("lock")
        if path in self.locked:
            raise BlockingIOError(errno.EWOULDBLOCK, "process 1")
        self.locked.add(path)
        return lambda: self.locked.discard(path)

    def _name(self, names: dict[Path, Inode]) -> None:
        self.names = names
        self.durable_names.append(names)


@pytest.fixture
def disk() -> Callable[..., Any]:
    """Disk(faults={number: kind}, seed=0)"""
    return Disk


@pytest.fixture
def power_cut() -> type[BaseException]:
    return PowerCut


@pytest.fixture
def story() -> Callable[[int], list[list[Record]]]:
    """Groups of records of a few processes, all different, by seed."""

    def tell(seed: int, length: int = 20) -> list[list[Record]]:
        chance, live, pid, token, groups = random.Random(seed), list[int](), 0, 0, list[list[Record]]()
        for _ in range(length):
            group: list[Record] = []
            for _ in range(chance.randrange(1, 4)):
                kind, token = (1 if len(live) > 1 else chance.randrange(5)) if live else 0, token + 1
                if kind == 0:
                    live.append(pid := pid + chance.randrange(1, 3))
                    request = Request(model="m", messages=[{"role": "user", "content": f"question {pid}"}])
                    group.append(Began(pid, request, chance.randrange(2**64), tuple(range(token, token + 9))))
                elif kind == 1:
                    group.append(Done(live.pop(chance.randrange(len(live)))))
                elif kind == 2:
                    group.append(Given(chance.choice(live), (token, token)))
                else:
                    group.append(Took(chance.choice(live), (token,), ((-0.1 * token, ((token, -0.5),)),)))
            groups.append(group)
        return groups

    return tell
