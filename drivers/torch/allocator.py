"""Gives freed host memory back to the system. Knows glibc's allocator and nothing of tensors or models.

glibc keeps up to 64 MiB free at the top of each thread's arena, and `malloc_trim` does not look there. A host that
unloads a model wants all of it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's parameters
_LARGEST_TRIM, _LARGEST_MMAP = 64 << 20, 32 << 20  # where glibc's own adjustment ends up once tensors were freed
_INSIDE: set[object] = set()  # who is in `releasing` now, in any thread: the threshold is one for the process
_INSIDE_LOCK = Lock()
_PROBE = 100_000  # bytes; large enough that freeing them trims the arena they are from


@contextmanager
def releasing() -> Iterator[None]:
    """What is freed inside goes back to the system. Does nothing where the C library is not glibc."""
    libc = _glibc()
    if libc is None:
        yield
        return
    me = object()
    with _INSIDE_LOCK:
        _INSIDE.add(me)
        libc.mallopt(_TRIM_THRESHOLD, 0)
    try:
        yield
        libc.malloc_trim(0)
        libc.free(libc.malloc(_PROBE))
    finally:
        with _INSIDE_LOCK:
            _INSIDE.discard(me)
            if not _INSIDE:
                libc.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM)
                libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)


@cache
def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "malloc_trim"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    return libc
