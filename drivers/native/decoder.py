"""A decoder as programs of native operations. Knows weights and rows; no files, no sampling.

rows of all sequences, one after another
  embedding -> { norm -> q, k, v -> rope -> pages, attention -> output -> + ; norm -> gate, up -> down -> + }
rows that sample -> norm -> head -> logits
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llm_os.drivers.formats.architecture import Architecture, Rope
from llm_os.drivers.formats.weights import Weights
from llm_os.drivers.native.attention import TILE
from llm_os.drivers.native.groups import GROUP
from llm_os.drivers.native.kernels import Sizes, load_kernels
from llm_os.drivers.native.machine import LANES
from llm_os.drivers.native.matrix import ROWS
from llm_os.drivers.native.packed import Floats, PackedEmbedding, PackedMatrix, head_of, shares_embedding
from llm_os.drivers.native.program import Program
from llm_os.drivers.native.threads import Team
from llm_os.drivers.torch.attention import Stretch
from llm_os.drivers.torch.decoder import layer_matrices
from llm_os.drivers.torch.embedding import EMBEDDING, FileEmbedding
from llm_os.drivers.torch.pool import KvPool
from llm_os.drivers.torch.rope import Rotation
from llm_os.drivers.torch.sampler import Scores
from llm_os.kernel.errors import FormatError

HEAD_ROWS = 32  # rows whose logits are there at a time
MAX_ROWS = 128  # that go through all layers together: what they leave on the way stays in the second cache
_ITEMS = 24  # of a product, so that threads share it evenly
_NO_WINDOW = 1 << 40
_POSITIONS = 1024  # whose angles are computed together


class _Layer:
    def __init__(self, a: Architecture, index: int, weights: Weights) -> None:
        names = layer_matrices(weights, index)
        inner = a.heads * a.head_dim
        sizes = {
            "qkv": (inner + 2 * a.kv_heads * a.head_dim, a.hidden),
            "output": (a.hidden, inner),
            "gate_up": (2 * a.intermediate, a.hidden),
            "down": (a.hidden, a.intermediate),
        }
        self.matrices = {name: PackedMatrix(weights, names[name], *size) for name, size in sizes.items()}
        self.index = index
        vectors = {"attention_norm": ["attn_norm.weight"], "feed_forward_norm": ["ffn_norm.weight"]}
        if a.qkv_bias:
            vectors["bias"] = [f"attn_{each}.bias" for each in "qkv"]
        if a.qk_norm:
            vectors["qk_norm"] = ["attn_q_norm.weight", "attn_k_norm.weight"]
        if a.post_norms:
            vectors["post_attention_norm"] = ["post_attention_norm.weight"]
            vectors["post_feed_forward_norm"] = ["post_ffw_norm.weight"]
        lengths = {"bias": sizes["qkv"][0], "qk_norm": 2 * a.head_dim}
        self.vectors = {
            name: _vector(weights, [f"blk.{index}.{part}" for part in parts], lengths.get(name, a.hidden))
            for name, parts in vectors.items()
        }

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.matrices.values()) + sum(v.nbytes for v in self.vectors.values())


def _vector(weights: Weights, names: list[str], length: int) -> Floats:
    """Those tensors in a row. Raises FormatError for another length: native code would read past it."""
    vector: Floats = np.concatenate([weights[name].float32().reshape(-1) for name in names])
    if len(vector) != length:
        raise FormatError(f"{' and '.join(names)} have {len(vector)} values; the model's sizes ask for {length}")
    return vector


class NativeDecoder:
    """A model's weights, packed, and the forward pass."""

    def __init__(self, architecture: Architecture, weights: Weights, team: Team) -> None:
        self._a = a = architecture
        self._team = team
        makers: list[Callable[[], Any]] = [partial(PackedMatrix, weights, [head_of(a)], a.vocab_size, a.hidden)]
        makers += [partial(_Layer, a, index, weights) for index in range(len(a.layers))]
        self._head: PackedMatrix
        self._layers: list[_Layer]
        self._head, *self._layers = team.map(lambda make: make(), makers)  # the head first: it takes longest
        self._embedding: PackedEmbedding | FileEmbedding = (
            PackedEmbedding(self._head) if shares_embedding(a, weights) else FileEmbedding(weights[EMBEDDING])
        )
        self._norm = _vector(weights, ["output_norm.weight"], a.hidden)
        self.nbytes = (
            self._embedding.nbytes + self._head.nbytes + self._norm.nbytes + sum(layer.nbytes for layer in self._layers)
        )
        ropes = {layer.rope for layer in a.layers}
        matrices = [self._head, *(matrix for layer in self._layers for matrix in layer.matrices.values())]
        self._kernels = load_kernels(
            Sizes(
                head_dim=a.head_dim,
                group=a.heads // a.kv_heads,
                rope_dims=tuple(sorted({rope.dim for rope in ropes})),
                qk_norm=a.qk_norm,
                activation=a.activation,
                kinds=tuple(sorted({kind for matrix in matrices for kind, _, _ in matrix.parts})),
            )
        )
        self._codes = self._kernels.codes
        self._angles = {rope: _Angles(rope) for rope in ropes}
        self._nothing = np.zeros(LANES, np.float32)
        self._rows = 0  # that buffers have room for
        self._base = 0

    def scores(self, tokens: list[int], stretches: list[Stretch], pool: KvPool, rows: list[int]) -> Iterator[Scores]:
        """Feed `tokens`, the rows of all `stretches` in order, and write their keys and values to `pool`.

        Yields the scores over the vocabulary of `rows`, which ascend, up to HEAD_ROWS at a time, in the place of those
        before. Rows are fed as far as scores are asked for."""
        for start in range(0, len(tokens), MAX_ROWS):
            stop = min(len(tokens), start + MAX_ROWS)
            part = [cut for stretch in stretches if (cut := _cut(stretch, start, stop)) is not None]
            self._feed(tokens[start:stop], part, pool)
            wanted = [row - start for row in rows if start <= row < stop]
            programs = [self._body]
            for first in range(0, len(wanted), HEAD_ROWS):
                some = wanted[first : first + HEAD_ROWS]
                self._wanted[: len(some)] = some
                self._state_head[0] = len(some)
                self._perform([*programs, self._end])
                programs = []
                best, finite = self._best[: len(some)].T.tolist()
                logits = torch.from_numpy(self._logits[: len(some), : self._a.vocab_size])
                yield Scores(logits, best, list(map(bool, finite)))
            if programs:
                self._perform(programs)

    def _feed(self, tokens: list[int], stretches: list[Stretch], pool: KvPool) -> None:
        """Get rows and their state ready."""
        count = len(tokens)
        if count > self._rows or pool.address != self._base:
            self._prepare(max(count, self._rows), pool)
        self._x[:count] = np.asarray(self._embedding.rows(tokens))
        if self._a.embedding_scale != 1:
            self._x[:count] *= np.float32(self._a.embedding_scale)
        self._place(stretches, pool, count)

    def _perform(self, programs: list[Program]) -> None:
        """One call of native code."""
        for program in programs:
            program.counters[:] = 0
        records = np.array([program.record for program in programs], np.int64)
        self._team.run(self._kernels.run, _address(records), len(records), self._team.count)

    def _place(self, stretches: list[Stretch], pool: KvPool, count: int) -> None:
        """Write down where every row's keys and values go, and who attends to what."""
        starts, lengths = np.array([(s.position, s.length) for s in stretches]).T
        tables = np.array([len(s.layout.pages) for s in stretches])
        tables = np.cumsum(tables) - tables
        pages = np.fromiter(chain.from_iterable(s.layout.pages for s in stretches), np.int64)
        begins = pool.begins(pages)
        firsts = np.cumsum(lengths) - lengths
        positions = np.arange(count) + np.repeat(starts - firsts, lengths)
        page, token = np.divmod(positions, pool.page_tokens)
        rows = begins[np.repeat(tables, lengths) + page]
        if count == len(stretches):
            tiles = np.stack([firsts, lengths, starts, tables], axis=1)
        else:
            tiles = np.array(
                [
                    (first + at, min(TILE, length - at), start + at, table)
                    for first, length, start, table in zip(firsts, lengths, starts, tables, strict=True)
                    for at in range(0, length, TILE)
                ]
            )
        for rope, angles in self._angles.items():
            self._angle_rows[rope][:count] = angles(positions)
        self._placed = (np.ascontiguousarray(tiles), begins, rows, token)
        addresses = map(_address, (rows, token, self._placed[0], begins))
        self._state[:6] = (count, len(tiles), *addresses)

    def _prepare(self, rows: int, pool: KvPool) -> None:
        """Buffers for so many rows, and the programs that use them."""
        a = self._a
        rows = max(HEAD_ROWS, 1 << (rows - 1).bit_length())
        self._rows, self._base = rows, pool.address
        inner = a.heads * a.head_dim
        widest = max(a.hidden, inner, a.intermediate)
        self._x, self._x_head = np.zeros((rows, a.hidden), np.float32), np.zeros((HEAD_ROWS, a.hidden), np.float32)
        self._y = np.zeros((rows, a.hidden if a.post_norms else 0), np.float32)
        self._qkv = np.zeros((rows, (a.heads + 2 * a.kv_heads) * a.head_dim), np.float32)
        self._attended = np.zeros((rows, inner), np.float32)
        self._gate_up = np.zeros((rows, 2 * a.intermediate), np.float32)
        self._logits = np.zeros((HEAD_ROWS, self._head.parts[0][2] * LANES), np.float32)
        self._integers = np.zeros(rows * widest, np.int8), np.zeros((rows * widest // GROUP, 3), np.float32)
        self._angle_rows = {rope: np.zeros((rows, rope.dim), np.float32) for rope in self._angles}
        self._state, self._state_head = np.zeros(8, np.int64), np.zeros(8, np.int64)
        self._wanted, self._best = np.zeros(HEAD_ROWS, np.int64), np.zeros((HEAD_ROWS, 2), np.int64)
        self._state_head[6] = _address(self._wanted)
        threads = self._team.count
        operations = [op for layer in self._layers for op in self._layer_program(layer, pool)]
        self._body = Program(operations, self._state, threads)
        self._end = Program([*self._head_program()], self._state_head, threads)

    def _head_program(self) -> Iterator[list[int]]:
        groups = self._a.hidden // GROUP
        yield [self._codes["gather"], 1, 1, _address(self._x_head), 0, _address(self._x), 0, groups]
        yield self._normed(self._x_head, self._norm)
        yield from self._product(self._head, self._logits)
        places = map(_address, (self._best, self._nothing, self._logits))
        yield [self._codes["best"], 1, 1, *places, 0, self._logits.shape[1], self._a.vocab_size]

    def _layer_program(self, layer: _Layer, pool: KvPool) -> Iterator[list[int]]:
        a, vectors, matrices = self._a, layer.vectors, layer.matrices
        shape = a.layers[layer.index]
        keys, values, head_bytes = pool.addresses(layer.index)
        inner = a.heads * a.head_dim
        scale = _bits(a.attention_scale * math.log2(math.e))  # the softmax is in powers of 2
        yield self._normed(self._x, vectors["attention_norm"])
        yield from self._product(matrices["qkv"], self._qkv, bias=vectors.get("bias"))
        yield [
            self._codes[f"rotation_{shape.rope.dim}"], 1, 1,
            _address(self._qkv), a.heads, a.kv_heads, self._qkv.shape[1], _address(self._angle_rows[shape.rope]), scale,
            keys, values, head_bytes, _address(vectors.get("qk_norm", self._nothing)), _bits(a.norm_eps),
        ]  # fmt: skip
        yield [
            self._codes["attention"], a.kv_heads, 0,
            _address(self._qkv), self._qkv.shape[1], _address(self._attended), self._attended.shape[1],
            keys, values, head_bytes, shape.window or _NO_WINDOW, pool.page_tokens,
        ]  # fmt: skip
        yield self._rounded("rounding", self._attended, inner)
        yield from self._added(matrices["output"], vectors.get("post_attention_norm"))
        yield self._normed(self._x, vectors["feed_forward_norm"])
        yield from self._product(matrices["gate_up"], self._gate_up)
        yield self._rounded("gate", self._gate_up, a.intermediate)
        yield from self._added(matrices["down"], vectors.get("post_feed_forward_norm"))

    def _added(self, matrix: PackedMatrix, norm: Floats | None) -> Iterator[list[int]]:
        """A product that is added to the rows, normed before where the model says so."""
        if norm is None:
            yield from self._product(matrix, self._x, add=True)
        else:
            yield from self._product(matrix, self._y)
            yield [
                self._codes["norm_added"], 1, 1, _address(self._x), 0, _address(self._y), _address(norm),
                self._a.hidden // GROUP, _bits(self._a.norm_eps),
            ]  # fmt: skip

    def _rounded(self, operation: str, rows: Floats, columns: int) -> list[int]:
        return [self._codes[operation], 1, 1, *map(_address, self._integers), _address(rows), 0, columns // GROUP]

    def _normed(self, rows: Floats, weight: Floats) -> list[int]:
        groups = self._a.hidden // GROUP
        return [
            self._codes["norm"], 1, 1, *map(_address, self._integers), _address(rows), _address(weight), groups,
            _bits(self._a.norm_eps),
        ]  # fmt: skip

    def _product(
        self, matrix: PackedMatrix, out: Floats, add: bool = False, bias: Floats | None = None
    ) -> Iterator[list[int]]:
        done = 0
        for kind, packed, blocks in matrix.parts:
            chunk = max(1, blocks // _ITEMS)
            place = self._nothing if bias is None else bias[done * LANES :]
            yield [
                self._codes[f"product_{kind}"], -(-blocks // chunk), ROWS, *map(_address, self._integers),
                _address(packed), _address(out) + 4 * LANES * done, matrix.groups, blocks, chunk, out.shape[1],
                int(add), _address(place), 0 if bias is None else 4 * LANES,
            ]  # fmt: skip
            done += blocks


def _cut(stretch: Stretch, start: int, stop: int) -> Stretch | None:
    """What of a stretch is in rows `start .. stop`, as rows from 0 on."""
    low, high = max(start, stretch.row), min(stop, stretch.row + stretch.length)
    if low >= high:
        return None
    if start == 0 and high - low == stretch.length:
        return stretch
    return Stretch(low - start, high - low, stretch.position + low - stretch.row, stretch.layout)


class _Angles:
    """Cosines and sines of a rotation, for the positions up to the last that has been asked for."""

    def __init__(self, rope: Rope) -> None:
        self._rope = rope
        self._table = np.zeros((0, rope.dim), np.float32)

    def __call__(self, positions: NDArray[np.int64]) -> Floats:
        last = int(positions.max())
        while last >= len(self._table):
            start = len(self._table)
            piece = Rotation(self._rope, torch.arange(start, start + _POSITIONS)).angles().numpy()
            self._table = np.concatenate([self._table, piece])
        return self._table[positions]


def _address(array: Any) -> int:
    address: int = array.ctypes.data
    return address


def _bits(number: float) -> int:
    return int.from_bytes(struct.pack("<f", number), "little")
