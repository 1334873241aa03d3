"""The few operations on files that the journal and the swap file are made of, so that a test can let any of them fail.

Everything that reaches a disk in this package goes through here. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from llm_os.drivers.store import lock


class File(Protocol):
    """An open file. Offsets and sizes in bytes; every call may raise OSError. Safe from several threads."""

    def size(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes:
        """What is there: fewer bytes at the end of the file, and perhaps before it."""
        ...

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """Returns how many bytes were written, which may be fewer. A file grows by it; gaps read as zeros."""
        ...

    def truncate(self, size: int) -> None: ...

    def sync(self) -> None:
        """Returns once contents and size are durable. After an error nobody can know whether they are, or ever will
        be: the system may have dropped what it could not write (fsyncgate; Rebello et al., ATC 2020)."""
        ...

    def close(self) -> None: ...


class Files(Protocol):
    """A file system. Every call may raise OSError, and may have done its work nevertheless."""

    def make_folder(self, path: Path) -> None:
        """Make a folder and its parents, for the owner only, durably. One that is there stays as it is."""
        ...

    def open(self, path: Path) -> File:
        """A file that is there. Raises FileNotFoundError."""
        ...

    def create(self, path: Path) -> File:
        """A new, empty file for the owner only, in place of any that was there."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """In place of any `new` that was there, at once. Durable after sync_folder."""
        ...

    def remove(self, path: Path) -> None: ...

    def sync_folder(self, path: Path) -> None:
        """Returns once names that were made, renamed or removed in it are durable."""
        ...

    def lock(self, path: Path) -> Callable[[], None]:
        """Take a lock that dies with this process; call the result to give it back.

        Raises BlockingIOError, whose strerror says who holds it.
        """
        ...


class LocalFile:
    """A file of this machine."""

    def __init__(self, path: Path, flags: int) -> None:
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(path, os.O_RDWR | flags, 0o600)
        self._seek = threading.Lock()  # for systems without pread

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        if sys.platform != "win32":
            return os.pread(self._descriptor, size, offset)
        with self._seek:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, size)

    def write(self, offset: int, data: bytes | memoryview) -> int:
        if sys.platform != "win32":
            return os.pwrite(self._descriptor, data, offset)
        with self._seek:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.write(self._descriptor, data)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        _sync(self._descriptor)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class LocalFiles:
    """The file system of this machine."""

    def make_folder(self, path: Path) -> None:
        missing = list(takewhile(lambda folder: not folder.is_dir(), [path, *path.parents]))
        for folder in reversed(missing):
            folder.mkdir(mode=0o700, exist_ok=True)
            self.sync_folder(folder.parent)

    def open(self, path: Path) -> LocalFile:
        return LocalFile(path, 0)

    def create(self, path: Path) -> LocalFile:
        path.unlink(missing_ok=True)  # never the same inode: what failed to be written to the old one is not here
        return LocalFile(path, os.O_CREAT | os.O_EXCL)

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def remove(self, path: Path) -> None:
        path.unlink()

    def sync_folder(self, path: Path) -> None:
        if sys.platform == "win32":
            return  # names are durable there, and folders cannot be opened
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lock(self, path: Path) -> Callable[[], None]:
        descriptor = lock.try_acquire(path)
        if descriptor is None:
            owner = ""
            with suppress(OSError):  # it may be gone by now, and other systems do not let a locked file be read
                owner = path.read_text(errors="replace")[:20]
            raise BlockingIOError(errno.EWOULDBLOCK, f"process {owner}" if owner.isdigit() else "another process")
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, b"%d" % os.getpid())
        return partial(lock.release, path, descriptor)


def read_all(file: File, offset: int, size: int) -> bytes:
    """Fewer bytes only where the file ends."""
    data = file.read(offset, size)
    while len(data) < size and (more := file.read(offset + len(data), size - len(data))):
        data += more
    return data


def write_all(file: File, offset: int, data: bytes) -> None:
    """All of it, or OSError; how much of it is there then is not known."""
    rest = memoryview(data)
    while rest:
        count = file.write(offset, rest)
        if count <= 0:
            raise OSError(errno.EIO, "the disk took nothing")
        offset, rest = offset + count, rest[count:]


if sys.platform == "darwin":
    import fcntl

    def _sync(descriptor: int) -> None:
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync there does not reach the platter

elif sys.platform == "win32":

    def _sync(descriptor: int) -> None:
        os.fsync(descriptor)

else:

    def _sync(descriptor: int) -> None:
        os.fdatasync(descriptor)
