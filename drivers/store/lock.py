"""A lock between threads and processes that the operating system releases when its holder dies, even by kill -9.

The lock is a file; it is removed on release, so that nothing is left behind. Knows nothing of what it guards.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_POLL_S = 0.05


def try_acquire(path: Path) -> int | None:
    """Take the lock at `path` and return its descriptor for `release`, or None while somebody else holds it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    while True:
        descriptor = os.open(path, flags, 0o600)
        try:
            if not _lock(descriptor):
                os.close(descriptor)
                return None
            if _is_still_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The last holder removed the file between our open and our lock: what we hold is nobody's lock any more.
        os.close(descriptor)


def release(path: Path, descriptor: int) -> None:
    """Give the lock back and remove its file."""
    # Removed while still held: whoever opened this file meanwhile sees in try_acquire that it is gone. Windows does not
    # remove open files, so there the file stays until the next holder.
    with suppress(OSError):
        path.unlink()
    os.close(descriptor)


@contextmanager
def held(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock at `path`. While somebody else has it, `waiting` is called every 50 ms; it may raise to give up."""
    while (descriptor := try_acquire(path)) is None:
        if waiting is not None:
            waiting()
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        release(path, descriptor)


def _is_still_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
