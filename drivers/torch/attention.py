"""Attention of one batch over paged keys and values. Knows slots and positions; no weights, no model family.

A row's bits must not depend on how its prompt was cut or on who shares its batch, so the order of every sum is fixed by
absolute positions:

    keys     |<------------- span (1024 positions) ------------->|<-------- span --------...
             | block (128) | block | block | ... | block |          spans follow each other with
    queries   16 positions x the heads of a group = one tile        a running maximum (Milakov and
                                                                    Gimelshein 2018)

Within a span each block's scores and outputs are one matrix product of one fixed shape, and blocks are added in order.
A masked block adds exact zeros, so it may as well be left out. Keys past the sequence's end are zeros, never what a
page held before: 0 * NaN is NaN.
"""

from __future__ import annotations

import math

import torch
from msgspec import Struct
from torch import Tensor

from llm_os.drivers.torch.pool import KvPool, Layout
from llm_os.drivers.torch.rows import elementwise

BLOCK = 128
SPAN = 8 * BLOCK
TILE = 16
_LOWEST = -3.0e38  # a running maximum before any score: finite, so that differences are never NaN
_LOG2_E = math.log2(math.e)  # the softmax is in powers of 2: torch's exp is ten times slower where it underflows


class Stretch(Struct, frozen=True):
    """One sequence's rows in a batch: rows `row .. row + length` are its positions `position .. position + length`."""

    row: int
    length: int
    position: int
    layout: Layout

    @property
    def end(self) -> int:
        return self.position + self.length


class _Tile(Struct, frozen=True):
    """Up to TILE query positions of one sequence."""

    row: int
    length: int
    position: int


class _Work(Struct, frozen=True):
    """The part of one tile's attention that reads keys `start .. stop` of one span, both multiples of BLOCK."""

    tile: int
    start: int
    stop: int
    hidden: Tensor | None  # bool [blocks, TILE, 1, BLOCK]; None where every query sees every key


class Plan:
    """Who attends to what in one batch, for one window; the same for all layers that have it."""

    def __init__(self, stretches: list[Stretch], window: int | None, device: torch.device) -> None:
        self.tiles: list[_Tile] = []
        self.spans: list[tuple[Layout, int, int, list[_Work]]] = []  # keys start .. stop, and who reads them
        for stretch in stretches:
            first = len(self.tiles)
            for offset in range(0, stretch.length, TILE):
                length = min(TILE, stretch.length - offset)
                self.tiles.append(_Tile(stretch.row + offset, length, stretch.position + offset))
            for span in range(0, stretch.end, SPAN):
                works = [
                    work
                    for index in range(first, len(self.tiles))
                    if (work := _work(index, self.tiles[index], span, window, device)) is not None
                ]
                if works:
                    low, high = min(work.start for work in works), max(work.stop for work in works)
                    self.spans.append((stretch.layout, low, min(high, stretch.end), works))


def _work(index: int, tile: _Tile, span: int, window: int | None, device: torch.device) -> _Work | None:
    last = tile.position + tile.length - 1
    seen = 0 if window is None else max(0, tile.position - window + 1)
    start = max(span, seen // BLOCK * BLOCK)
    stop = min(span + SPAN, last // BLOCK * BLOCK + BLOCK)
    if start >= stop:
        return None
    keys = torch.arange(start, stop)
    queries = torch.arange(tile.position, tile.position + TILE).clamp(max=last)[:, None]  # spare rows repeat the last
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    if not hidden.any():
        return _Work(index, start, stop, None)
    return _Work(index, start, stop, hidden.view(TILE, -1, 1, BLOCK).transpose(0, 1).contiguous().to(device))


def attend(plan: Plan, pool: KvPool, layer: int, queries: Tensor, scale: float) -> Tensor:
    """Softmax attention of `queries` [n, heads, head_dim] over the layer's pages; `scale` multiplies the scores.

    Returns [n, heads * head_dim].
    """
    rows, heads, dim = queries.shape
    queries = queries * (scale * _LOG2_E)
    kv = pool.layer(layer)
    kv_heads = kv.shape[2]
    group = heads // kv_heads
    output = queries.new_empty(rows, kv_heads, group, dim)
    states: dict[int, _State] = {}
    scratch = queries.new_empty(2 * kv_heads * SPAN * dim)
    for layout, low, high, works in plan.spans:
        keys, values = _gather(kv, layout, low, high, scratch)
        for work in works:
            tile = plan.tiles[work.tile]
            state = states.get(work.tile)
            if state is None:
                rows_of_tile = slice(tile.row, tile.row + tile.length)
                state = _State(queries[rows_of_tile].view(tile.length, kv_heads, group, dim))
                states[work.tile] = state
            blocks = slice((work.start - low) // BLOCK, (work.stop - low) // BLOCK)
            state.add(keys[:, blocks], values[:, blocks], work.hidden)
    for index, state in states.items():
        tile = plan.tiles[index]
        output[tile.row : tile.row + tile.length] = state.result(tile.length)
    return output.view(rows, heads * dim)


def _gather(kv: Tensor, layout: Layout, start: int, stop: int, scratch: Tensor) -> Tensor:
    """Keys and values of tokens `start .. stop` as [2, kv_heads, blocks, BLOCK, dim], zeros after `stop`."""
    _, _, kv_heads, _, dim = kv.shape
    room = -(-(stop - start) // BLOCK) * BLOCK
    gathered = scratch[: 2 * kv_heads * room * dim].view(2, kv_heads, room, dim)
    for piece in layout.pieces(start, stop):
        place = piece.start - start
        gathered[:, :, place : place + piece.length] = kv[piece.frame, :, :, piece.offset : piece.offset + piece.length]
    gathered[:, :, stop - start :] = 0
    return gathered.view(2, kv_heads, room // BLOCK, BLOCK, dim)


class _State:
    """The running softmax of one tile: maximum, sum and weighted values so far."""

    def __init__(self, queries: Tensor) -> None:
        length, kv_heads, group, dim = queries.shape
        self._queries = queries.new_zeros(kv_heads, 1, TILE, group, dim)
        self._queries[:, 0, :length] = queries.transpose(0, 1)
        self._rows = TILE * group
        self._maximum = queries.new_full((kv_heads, self._rows), _LOWEST)
        self._sum: Tensor | None = None
        self._values = queries.new_zeros(())

    def add(self, keys: Tensor, values: Tensor, hidden: Tensor | None) -> None:
        """Attend to the keys of one span, [kv_heads, blocks, BLOCK, dim]."""
        kv_heads, blocks, _, dim = keys.shape
        queries = self._queries.expand(-1, blocks, -1, -1, -1).reshape(kv_heads * blocks, self._rows, dim)
        scores = torch.bmm(queries, keys.reshape(-1, BLOCK, dim).transpose(1, 2))
        scores = scores.view(kv_heads, blocks, self._rows, BLOCK)
        if hidden is not None:
            scores.view(kv_heads, blocks, TILE, -1, BLOCK).masked_fill_(hidden, -torch.inf)
        maximum = torch.maximum(self._maximum, scores.amax(dim=(1, 3)))
        weights = elementwise(torch.exp2, scores.sub_(maximum[:, None, :, None]))
        sums = weights.sum(-1)
        products = torch.bmm(weights.view(-1, self._rows, BLOCK), values.reshape(-1, BLOCK, dim))
        products = products.view(kv_heads, blocks, self._rows, dim)
        first = 0
        if self._sum is None:
            self._sum, self._values, first = sums[:, 0], products[:, 0], 1
        else:
            decay = elementwise(torch.exp2, self._maximum - maximum)
            self._sum = self._sum * decay
            self._values = self._values * decay[..., None]
        for block in range(first, blocks):
            self._sum = self._sum + sums[:, block]
            self._values = self._values + products[:, block]
        self._maximum = maximum

    def result(self, length: int) -> Tensor:
        """[length, kv_heads, group, dim]."""
        assert self._sum is not None
        mean = self._values / self._sum[..., None]
        kv_heads, _, dim = mean.shape
        return mean.view(kv_heads, TILE, -1, dim)[:, :length].transpose(0, 1)
