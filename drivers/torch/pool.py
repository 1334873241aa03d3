"""The KV pool of one model: the memory behind its pages. Page numbers come from the kernel; no model, no attention.

    pool[layer, key or value, kv head, page * page_tokens + slot, dim]        float32

A run of consecutive pages is one contiguous slice for each head, so that attention reads slices wherever the kernel
could place pages side by side.
"""

from __future__ import annotations

import mmap
import sys

import torch
from msgspec import Struct
from torch import Tensor

from llm_os.kernel.driver import Move

_MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


class Run(Struct, frozen=True):
    """Tokens `start .. start + length` of a sequence, which lie at `slot .. slot + length` of the pool."""

    start: int
    slot: int
    length: int


class PageTable:
    """Where one sequence's tokens lie: its page numbers, read as runs."""

    def __init__(self, pages: tuple[int, ...], page_tokens: int) -> None:
        self._pages = pages
        self._page_tokens = page_tokens
        self._runs: list[Run] = []
        for index, page in enumerate(pages):
            start, slot = index * page_tokens, page * page_tokens
            last = self._runs[-1] if self._runs else None
            if last is not None and last.slot + last.length == slot:
                self._runs[-1] = Run(last.start, last.slot, last.length + page_tokens)
            else:
                self._runs.append(Run(start, slot, page_tokens))

    def slots(self, start: int, stop: int) -> list[int]:
        """The pool's slot of each token."""
        size = self._page_tokens
        return [self._pages[token // size] * size + token % size for token in range(start, stop)]

    def runs(self, start: int, stop: int) -> list[Run]:
        """The runs that hold tokens `start .. stop`, cut to them."""
        cut = []
        for run in self._runs:
            low, high = max(start, run.start), min(stop, run.start + run.length)
            if low < high:
                cut.append(Run(low, run.slot + low - run.start, high - low))
        return cut


class KvPool:
    """Keys and values of every page of one model. Memory is committed when a page is first written."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, page_tokens: int, pages: int, device: torch.device
    ) -> None:
        self.page_tokens = page_tokens
        self.pages = pages
        self._page_bytes = layers * 2 * kv_heads * page_tokens * head_dim * 4
        shape = (layers, 2, kv_heads, pages * page_tokens, head_dim)
        self._lazy = device.type == "cpu"
        self._tensor = _reserve(shape) if self._lazy else torch.empty(shape, device=device)
        self._written = bytearray(pages)

    @property
    def nbytes(self) -> int:
        """Bytes really held: of the pages ever written on a CPU, of the whole pool elsewhere."""
        return self._page_bytes * (sum(self._written) if self._lazy else self.pages)

    def touch(self, pages: tuple[int, ...]) -> None:
        """Note that `pages` are about to be written."""
        for page in pages:
            self._written[page] = 1

    def layer(self, index: int) -> Tensor:
        """Keys and values of a layer, [2, kv_heads, slots, head_dim], to read and to write."""
        return self._tensor[index]

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Put `keys` and `values`, [n, kv_heads, head_dim], at `slots` [n]."""
        kv = self._tensor[layer]
        kv[0].index_copy_(1, slots, keys.transpose(0, 1))
        kv[1].index_copy_(1, slots, values.transpose(0, 1))

    def copy(self, moves: tuple[Move, ...]) -> None:
        """Copy whole pages. No target is a source."""
        layers, two, kv_heads, _, head_dim = self._tensor.shape
        paged = self._tensor.view(layers * two * kv_heads, self.pages, self.page_tokens, head_dim)
        sources = torch.tensor([move.source for move in moves], device=paged.device)
        targets = torch.tensor([move.target for move in moves], device=paged.device)
        paged.index_copy_(1, targets, paged.index_select(1, sources))
        self.touch(tuple(move.target for move in moves))


def _reserve(shape: tuple[int, ...]) -> Tensor:
    """Zeros, float32, each of the system's pages committed when it is first written, all given back with the tensor.

    A mapping of our own rather than `torch.empty`: the allocator may keep what it is given back, and huge pages would
    commit 2 MiB for every page of each head.
    """
    nbytes = 4 * int(torch.Size(shape).numel())
    if sys.platform != "linux":
        return torch.zeros(shape)
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.float32).view(shape)
