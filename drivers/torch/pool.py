"""The KV pool of one model: how its pages lie in frames. Page numbers come from the kernel; no model, no attention.

    page = frame * slots + slot                                    as in the kernel's ledger
    pool[frame, layer, key or value, kv head, slot * page_tokens + token, dim]

A run of consecutive pages of one frame is one contiguous slice for each head, so that attention reads slices wherever
the kernel could place pages side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from math import prod

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from llm_os.kernel.driver import Move
from llm_os.kernel.errors import DriverError

Places = tuple[Tensor, Tensor]  # of n tokens: their frames, and their offsets there; [n] each


class Piece(Struct, frozen=True):
    """Tokens `start .. start + length` of a sequence, which lie at `offset .. offset + length` of a frame."""

    start: int
    frame: int
    offset: int
    length: int


class Layout:
    """Where one sequence's tokens lie: its page numbers, read as pieces, each one slice."""

    def __init__(self, pages: tuple[int, ...], page_tokens: int, slots: int) -> None:
        """`slots` is how many pages a frame has."""
        self.pages = pages
        self._page_tokens = page_tokens
        self._slots = slots

    @cached_property
    def _pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        for index, page in enumerate(self.pages):
            frame, slot = divmod(page, self._slots)
            offset = slot * self._page_tokens
            last = pieces[-1] if pieces else None
            if last is not None and last.frame == frame and last.offset + last.length == offset:
                pieces[-1] = Piece(last.start, frame, last.offset, last.length + self._page_tokens)
            else:
                pieces.append(Piece(index * self._page_tokens, frame, offset, self._page_tokens))
        return pieces

    def frames(self, start: int, stop: int) -> set[int]:
        """The frames that hold tokens `start .. stop`."""
        pages = self.pages[start // self._page_tokens : -(-stop // self._page_tokens)]
        return {page // self._slots for page in pages}

    def places(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Frame, and offset in the frame, of each of tokens `start .. stop`."""
        return [(piece.frame, piece.offset + i) for piece in self.pieces(start, stop) for i in range(piece.length)]

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The pieces that hold tokens `start .. stop`, cut to them."""
        cut = []
        for piece in self._pieces:
            low, high = max(start, piece.start), min(stop, piece.start + piece.length)
            if low < high:
                cut.append(Piece(low, piece.frame, piece.offset + low - piece.start, high - low))
        return cut


class KvPool:
    """Keys and values of every page of one model: a view of memory that others may share, frame by frame."""

    def __init__(self, frames: Tensor, page_shape: tuple[int, ...], slots: int, pages: int) -> None:
        """`frames` is [frames, values of one]; `page_shape` is (layers, 2, kv_heads, page_tokens, head_dim)."""
        self.page_shape = page_shape
        self.slots = slots
        self.pages = pages
        layers, two, kv_heads, self.page_tokens, head_dim = page_shape
        used = frames[:, : prod(page_shape) * slots]
        self._tensor = used.view(-1, layers, two, kv_heads, slots * self.page_tokens, head_dim)

    @property
    def page_bytes(self) -> int:
        return self._tensor.element_size() * prod(self.page_shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    @property
    def address(self) -> int:
        """Of frame 0."""
        return self._tensor.data_ptr()

    def addresses(self, layer: int) -> tuple[int, int, int]:
        """Of a layer's keys and values in frame 0, and the bytes from one head to the next."""
        size = self._tensor.element_size()
        steps = [size * step for step in self._tensor.stride()]
        keys = self.address + layer * steps[1]
        return keys, keys + steps[2], steps[3]

    def begins(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where pages begin, in numbers from frame 0."""
        frames, slots = np.divmod(pages, self.slots)
        begins: NDArray[np.int64] = frames * self._tensor.stride(0) + slots * (self.page_tokens * self.page_shape[-1])
        return begins

    def layer(self, index: int) -> Tensor:
        """Keys and values of a layer, [frames, 2, kv_heads, slots * page_tokens, head_dim], to read and to write."""
        return self._tensor[:, index]

    def page(self, page: int) -> Tensor:
        """One page, `page_shape`, to read and to write."""
        frame, slot = divmod(page, self.slots)
        return self._tensor[frame, :, :, :, slot * self.page_tokens : (slot + 1) * self.page_tokens]

    def frames_of(self, pages: Iterable[int]) -> set[int]:
        return {page // self.slots for page in pages}

    def write(self, layer: int, keys: Tensor, values: Tensor, places: Places) -> None:
        """Put `keys` and `values`, [n, kv_heads, head_dim], at `places`."""
        frames, offsets = places
        self._tensor[:, layer, 0][frames, :, offsets] = keys
        self._tensor[:, layer, 1][frames, :, offsets] = values

    def copy(self, moves: tuple[Move, ...]) -> None:
        """Copy whole pages. No target is a source."""
        for move in moves:
            self.page(move.target).copy_(self.page(move.source))

    def read(self, pages: tuple[int, ...]) -> tuple[bytes, ...]:
        """The bits of whole pages, `page_bytes` each."""
        scratch = torch.empty(self.page_shape, dtype=self._tensor.dtype)
        return tuple(scratch.copy_(self.page(page)).numpy().tobytes() for page in pages)

    def check(self, pages: tuple[int, ...], contents: tuple[bytes, ...]) -> None:
        """Raises DriverError where `restore` could not be done."""
        lengths = {len(content) for content in contents} or {self.page_bytes}
        if len(pages) != len(contents) or lengths != {self.page_bytes}:
            raise DriverError(
                f"{len(contents)} contents of {min(lengths)} to {max(lengths)} bytes do not fit {len(pages)} KV pages "
                f"of {self.page_bytes} bytes; give back what swap_out returned"
            )

    def restore(self, pages: tuple[int, ...], contents: tuple[bytes, ...]) -> None:
        """Write what `read` returned into whole pages, these or others."""
        scratch = torch.empty(self.page_shape, dtype=self._tensor.dtype)
        flat = scratch.view(-1).numpy()
        for page, content in zip(pages, contents, strict=True):
            flat[:] = np.frombuffer(content, flat.dtype)
            self.page(page).copy_(scratch)
