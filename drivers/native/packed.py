"""Weights in groups and blocks, packed from what a file has. Knows the types of files, no operations.

`groups` draws the layout.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.formats.changed import HEAD
from llm_os.drivers.formats.quants import dequantize
from llm_os.drivers.formats.weights import Weights
from llm_os.drivers.native.groups import GROUP, GROUP_BYTES, Kind
from llm_os.drivers.native.machine import LANES
from llm_os.drivers.torch.embedding import EMBEDDING
from llm_os.drivers.torch.page_cache import leave
from llm_os.kernel.errors import FormatError

PART_VALUES = 1 << 17  # packed at a time by one thread while loading; they take up to 17 bytes each
_FOUR_BITS: dict[str, Kind] = {"Q4_1": "Q4", "Q4_0": "Q4", "Q4_K": "Q4F"}
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def kind_of(stored: str) -> Kind:
    """How a matrix of this GGML type is held. 4-bit types lose nothing; others become 8 bits in groups."""
    return _FOUR_BITS.get(stored, "Q8")


def packed_bytes(kind: Kind, rows: int, columns: int) -> int:
    return -(-rows // LANES) * (columns // GROUP) * GROUP_BYTES[kind]


def fits(a: Architecture) -> bool:
    """Whether every matrix can be cut into groups and blocks, and every rotation into vectors."""
    sizes = [a.hidden, a.intermediate, a.heads * a.head_dim]
    rotated = [layer.rope.dim for layer in a.layers]
    return (
        all(size % GROUP == 0 for size in sizes)
        and a.head_dim % LANES == 0
        and all(size % (2 * LANES) == 0 and size <= a.head_dim for size in rotated)
    )


def head_of(a: Architecture) -> str:
    """The tensor that the head is made of. A tied one stays one with the embedding, whatever a pass asks for it."""
    return EMBEDDING if a.tied_embeddings else HEAD


def shares_embedding(a: Architecture, weights: Weights) -> bool:
    """Whether token vectors are read from the packed head, which has them bit for bit."""
    return a.tied_embeddings and weights[EMBEDDING].kind == "Q8_0"


class PackedMatrix:
    """Tensors whose rows follow each other, packed: those of one kind together."""

    def __init__(self, weights: Weights, names: list[str], rows: int, columns: int) -> None:
        """Raises FormatError where all together are no matrix of so many rows and columns: native code would read
        past it."""
        self.parts: list[tuple[Kind, Bytes, int]] = []  # with its blocks
        for name in names:
            tensor = weights[name]
            kind, count = kind_of(tensor.kind), len(tensor.data)
            rows -= count
            if rows < 0 or tensor.shape != (count, columns) or (count % LANES and len(names) > 1):
                raise FormatError(f"{name} has shape {tensor.shape}, which does not fit the model's sizes")
            out = _memory(packed_bytes(kind, count, columns))
            step = max(LANES, PART_VALUES // columns // LANES * LANES)
            for start in range(0, count, step):
                part = tensor.data[start : start + step]
                low = packed_bytes(kind, start, columns)
                pack(part, tensor.kind, columns, out[low : low + packed_bytes(kind, len(part), columns)])
            self.parts.append((kind, out, -(-count // LANES)))
            leave(tensor.data)
        if rows:
            raise FormatError(f"{' and '.join(names)} lack {rows} rows of the model's sizes")
        self.groups = columns // GROUP

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for _, part, _ in self.parts)


def _memory(size: int) -> Bytes:
    """Memory of its own, which goes back to the system as soon as nobody holds it: an allocator may keep it."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, max(1, size), flags=flags), np.uint8, size)


class PackedEmbedding:
    """Token vectors, read from a packed head. Holds nothing itself."""

    nbytes = 0

    def __init__(self, head: PackedMatrix) -> None:
        ((_, packed, blocks),) = head.parts
        whole = packed.reshape(blocks, head.groups, 576)
        self._codes = whole[:, :, :512].view("<u4").reshape(blocks, head.groups, 8, LANES)
        self._scales = whole[:, :, 512:].view("<f4")

    def rows(self, tokens: list[int]) -> Floats:
        """[len(tokens), hidden], float32."""
        block, lane = np.divmod(np.array(tokens), LANES)
        codes = np.ascontiguousarray(self._codes[block, :, :, lane]).view(np.uint8).reshape(len(tokens), -1, GROUP)
        values: Floats = (codes.astype(np.float32) - 128) * self._scales[block, :, lane][..., None]
        return values.reshape(len(tokens), -1)


def pack(data: NDArray[np.uint8], stored: str, columns: int, out: NDArray[np.uint8]) -> None:
    """Rows of bytes, as a file of type `stored` has them, into the `packed_bytes` of `out`. Rows are filled up to whole
    blocks with zeros."""
    kind = kind_of(stored)
    if len(data) % LANES:
        data = np.concatenate([data, np.zeros((-len(data) % LANES, data.shape[1]), np.uint8)])
    blocks, groups = len(data) // LANES, columns // GROUP
    packed = out.reshape(blocks, groups, GROUP_BYTES[kind])
    numbers = np.dtype("<f2" if kind == "Q4" else "<f4")
    codes, *scales = _bytes_of(data, stored, columns) if kind == "Q8" else _nibbles_of(data, stored)
    words = codes.shape[-1]
    target = packed[:, :, : 64 * words].view("<u4").reshape(blocks, groups, words, LANES)
    target[...] = codes.reshape(blocks, LANES, groups, words).transpose(0, 2, 3, 1)
    for i, scale in enumerate(scales):
        start = 64 * words + i * numbers.itemsize * LANES
        place = packed[:, :, start : start + numbers.itemsize * LANES].view(numbers)
        place[...] = scale.reshape(blocks, LANES, groups).transpose(0, 2, 1)


def _nibbles_of(data: NDArray[np.uint8], stored: str) -> tuple[NDArray[Any], ...]:
    """Codes, [rows, groups, 4 words], column i in the low half of byte i and column 16+i in its high half; d and m,
    [rows, groups]."""
    if stored == "Q4_K":
        return _nibbles_of_q4_k(data)
    if stored == "Q4_1":
        blocks = np.ascontiguousarray(data).view("<u4").reshape(len(data), -1, 5)
        halves = blocks.view("<f2").reshape(*blocks.shape[:2], 10)
        return blocks[..., 1:], halves[..., 0], halves[..., 1]
    halves = np.ascontiguousarray(data).view("<f2").reshape(len(data), -1, 9)
    return np.ascontiguousarray(halves[..., 1:]).view("<u4"), halves[..., 0], -8 * halves[..., 0]


def _nibbles_of_q4_k(data: NDArray[np.uint8]) -> tuple[NDArray[Any], ...]:
    """256 values in 144 bytes: two float16 numbers, 8 scales and 8 minima of 6 bits, and codes, 32 low halves first."""
    blocks = data.reshape(len(data), -1, 144)
    whole = np.ascontiguousarray(blocks[..., :4]).view("<f2").astype(np.float32)
    low, mid, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    steps = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=-1)
    starts = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=-1)
    pairs = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    values = np.stack([pairs & 15, pairs >> 4], axis=3).reshape(len(data), -1, GROUP)
    d, m = whole[..., :1] * steps, -whole[..., 1:] * starts
    codes = values[..., :16] | values[..., 16:] << 4
    return codes.view("<u4"), d.reshape(len(data), -1), m.reshape(len(data), -1)


def _bytes_of(data: NDArray[np.uint8], stored: str, columns: int) -> tuple[NDArray[Any], ...]:
    """Codes plus 128, [rows, groups, 8 words], and d, [rows, groups]. From any type; Q8_0 is taken as it is."""
    if stored == "Q8_0":
        halves = np.ascontiguousarray(data).view("<f2").reshape(len(data), -1, 17)
        return np.ascontiguousarray(halves[..., 1:]).view("<u4") ^ np.uint32(0x80808080), halves[..., 0]
    values = dequantize(data, stored, columns).reshape(len(data), -1, GROUP)
    d = np.abs(values).max(-1) / np.float32(127)
    with np.errstate(all="ignore"):
        codes = np.nan_to_num(np.rint(values / d[..., None]), nan=0, posinf=0, neginf=0)
    d[~np.isfinite(d)] = np.nan
    return (codes.clip(-127, 127) + 128).astype(np.uint8).view("<u4"), d
