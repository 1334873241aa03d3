"""Brings weights from disk into the system's file cache, and lets go of them. Knows mapped files, no device and no
tensors' meaning."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from llm_os.drivers.formats.weights import Weights


def warm(weights: Weights) -> None:
    """Read every tensor once; returns when all are in the cache.

    Keeps nothing. Tensors that a file stores in another order are copied to be seen, one at a time.
    """
    seen: set[int] = set()
    for name in weights.names():
        data = weights[name].data.reshape(-1)
        mapping = _mapping(data)
        if mapping is not None and id(mapping) not in seen and hasattr(mmap, "MADV_WILLNEED"):
            seen.add(id(mapping))
            mapping.madvise(mmap.MADV_WILLNEED)  # reads ahead in large pieces what the loop then waits for
        if len(data):
            data[:: mmap.PAGESIZE].max()


def leave(data: NDArray[np.uint8]) -> None:
    """These bytes of a mapped file have been read: the process need not hold them any more. The cache still does."""
    mapping = _mapping(data)
    if mapping is None or not hasattr(mmap, "MADV_DONTNEED") or not data.flags.c_contiguous:
        return
    begin = data.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    start = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages: what else lies there may be read next
    stop = (begin + data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


def leave_all(weights: Weights) -> None:
    """The same for files that the weights are in, with what was read along with them."""
    names = (name for name in weights.names() if "norm" in name)  # small; matrices may be copied to be seen
    mappings = {id(mapping): mapping for name in names if (mapping := _mapping(weights[name].data.reshape(-1)))}
    for mapping in mappings.values():
        if hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)


def _mapping(data: NDArray[np.uint8]) -> mmap.mmap | None:
    """The mapped file that `data` is a view of."""
    owner: object = data
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner if isinstance(owner, mmap.mmap) else None
