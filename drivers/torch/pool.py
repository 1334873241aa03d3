"""The KV pool of one model: how its pages lie in frames. Page numbers come from the kernel; no model, no attention.

    page = frame * slots + slot                                    as in the kernel's ledger
    pool[frame, layer, key or value, kv head, slot * page_tokens + token, dim]        float32

A run of consecutive pages of one frame is one contiguous slice for each head, so that attention reads slices wherever
the kernel could place pages side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np
import torch
from msgspec import Struct
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
        self._pieces: list[Piece] = []
        for index, page in enumerate(pages):
            frame, slot = divmod(page, slots)
            offset = slot * page_tokens
            last = self._pieces[-1] if self._pieces else None
            if last is not None and last.frame == frame and last.offset + last.length == offset:
                self._pieces[-1] = Piece(last.start, frame, last.offset, last.length + page_tokens)
            else:
                self._pieces.append(Piece(index * page_tokens, frame, offset, page_tokens))

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
        """`frames` is [frames, float32 values of one]; `page_shape` is (layers, 2, kv_heads, page_tokens, head_dim)."""
        self.page_shape = page_shape
        self.slots = slots
        self.pages = pages
        layers, two, kv_heads, self.page_tokens, head_dim = page_shape
        used = frames[:, : prod(page_shape) * slots]
        self._tensor = used.view(-1, layers, two, kv_heads, slots * self.page_tokens, head_dim)

    @property
    def page_bytes(self) -> int:
        return 4 * prod(self.page_shape)

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
        scratch = torch.empty(self.page_shape)
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
        scratch = torch.empty(self.page_shape)
        for page, content in zip(pages, contents, strict=True):
            scratch.view(-1).numpy()[:] = np.frombuffer(content, np.float32)
            self.page(page).copy_(scratch)
