"""Matrices that a pass asked to hold in fewer bytes: 8-bit integers by row, 4-bit ones in groups. Knows no model.

Four ways to multiply, chosen when a matrix is loaded; each gives a row the same bits in any company:

    onednn     8-bit rows and activations, quantized by row, in the processor's integer instructions. Sums of integers
               are exact, so neither their order nor the other rows matter. (oneDNN's own correction for activations
               that are stored as 0 to 255 is not: from 16 rows on it is a float's. So it is made here.)
    emulated   the same integers in float32 products, which are exact below 2**24: the same bits as onednn, on any
               processor, more slowly.
    int4       4-bit groups and bfloat16 activations in torch's own kernel; used only where a probe finds that it
               treats a row the same in any company.
    unpacked   dequantized to the format's type, some rows at a time, and multiplied in tiles like any matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from llm_os.drivers.formats.integer_rows import BLOCK, hadamard
from llm_os.drivers.formats.quants import held_row_bytes
from llm_os.drivers.torch.rows import by_tiles

Way = Literal["onednn", "emulated", "int4", "unpacked"]
UNPACKED_BYTES = 4 << 20  # of float32 values that a product has unpacked at a time
_EXACT = 1024  # columns whose products of 8-bit integers sum to less than 2**24
_LARGEST = 65536  # columns whose products of 8-bit integers surely fit 32 bits
_GROUP, _GROUP_BYTES = 32, 20  # Q4_1


def choose_way(kind: str, rows: int, columns: int, integers: Way | None, int4: bool) -> Way:
    """How a matrix of this type and shape is multiplied, where the device has `integers` and `int4`."""
    even = rows % 64 == 0 and columns % 64 == 0  # else oneDNN pads, and holds more bytes
    if kind == "Q4_1":
        return "int4" if int4 and even else "unpacked"
    if integers == "onednn" and not (even and columns <= _LARGEST):
        return "emulated"
    return integers or "unpacked"


def held_bytes(way: Way, kind: str, rows: int, columns: int) -> int:
    """What the matrix takes on the device."""
    if way == "onednn":
        return rows * (columns + 12)  # a scale, a correction, and one that oneDNN stores although it is not used
    if way == "emulated":
        return rows * (columns + 8)
    return rows * held_row_bytes(kind, columns)


class IntegerLinear:
    """8-bit rows times rows that are quantized to 8 bits, each with a scale of its own. For "onednn" and "emulated"."""

    def __init__(self, parts: Iterable[Tensor], kind: str, way: Way) -> None:
        """`parts` are consecutive rows, as bytes. Each is packed on its own, so that no second copy of a large matrix
        is ever held."""
        self._rotation = rotation(kind, torch.device("cpu"))
        part = _PackedIntegers if way == "onednn" else _PlainIntegers
        self._parts = [part(rows) for rows in parts]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def __call__(self, x: Tensor) -> Tensor:
        x = rotate(x, self._rotation)
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min_(1e-30)
        codes = (x / scale).add_(128.5).to(torch.uint8)  # rounded, and from 1 to 255
        return _joined([part(codes) for part in self._parts]).mul_(scale)


def _split(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, integers, and 128 times the integers' sums, of rows of bytes."""
    codes = rows[:, 4:].view(torch.int8).contiguous()
    sums = torch.empty(len(codes))
    for start, stop in _pieces(*codes.shape):  # torch widens what it sums first
        sums[start:stop] = codes[start:stop].sum(1, dtype=torch.int32)
    return rows[:, :4].contiguous().view(torch.float32).view(-1), codes, 128 * sums  # exact: below 2**31


class _PackedIntegers:
    """Some rows of an IntegerLinear, in oneDNN's layout. Takes activations as 1 to 255, for -127 to 127."""

    def __init__(self, rows: Tensor) -> None:
        self._scales, codes, sums = _split(rows)
        self._offsets = sums * self._scales
        self._codes = torch.ops.onednn.qlinear_prepack(codes, None)

    @property
    def nbytes(self) -> int:
        return int(torch.ops.mkldnn._nbytes(self._codes)) + self._scales.nbytes + self._offsets.nbytes

    def __call__(self, codes: Tensor) -> Tensor:
        weight = (self._codes, self._scales, _no_zero_point())
        multiply = torch.ops.onednn.qlinear_pointwise
        product: Tensor = multiply(codes, 1.0, 0, *weight, None, 1.0, 0, torch.float32, "none", [], "")
        return product.sub_(self._offsets)


class _PlainIntegers:
    """The same, with the same bits, in products of float32."""

    def __init__(self, rows: Tensor) -> None:
        self._scales, self._codes, self._offsets = _split(rows)

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes + self._offsets.nbytes

    def __call__(self, codes: Tensor) -> Tensor:
        rows, columns = self._codes.shape
        signed = codes.float() - 128
        product = signed.new_empty(len(codes), rows)
        for start, stop in _pieces(rows, columns):
            total: Tensor | None = None
            for first in range(0, columns, _EXACT):
                weight = self._codes[start:stop, first : first + _EXACT].float()
                piece = functional.linear(signed[:, first : first + _EXACT], weight)
                total = piece if total is None else total.double() + piece
            assert total is not None
            offsets, scales = self._offsets[start:stop], self._scales[start:stop]
            shifted = (total.double() + offsets).float()  # rounded once, as from 32-bit integers
            product[:, start:stop] = shifted * scales - offsets * scales
        return product


class Int4Linear:
    """Q4_1 in torch's layout for 4-bit weights: scales become bfloat16, the integers stay. For "int4"."""

    def __init__(self, parts: Iterable[Tensor], columns: int) -> None:
        """`parts` as for IntegerLinear."""
        self._parts = [_pack_int4(rows, columns) for rows in parts]

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes + scales.nbytes for packed, scales in self._parts)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return _joined([multiply(x, packed, _GROUP, scales) for packed, scales in self._parts]).float()


def _pack_int4(rows: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    packed = rows.new_empty(len(rows), columns // 2)
    scales = torch.empty(columns // _GROUP, len(rows), 2, dtype=torch.bfloat16)
    for start, stop in _pieces(len(rows), columns):  # torch packs from 32-bit integers, 64 rows by themselves
        steps, starts, codes = _groups(rows[start:stop])
        whole = codes.int().view(-1, columns)
        packed[start:stop] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
        scales[:, start:stop] = torch.cat([steps, starts + 8 * steps], dim=-1).transpose(0, 1)
    return packed, scales


class UnpackedLinear:
    """Bytes as a pass made them, on any device. For "unpacked"."""

    def __init__(self, data: Tensor, kind: str, columns: int, tile: int, dtype: torch.dtype) -> None:
        self._data = data
        self._integers = kind != "Q4_1"
        self._rotation = rotation(kind, data.device)
        self._columns = columns
        self._tile = tile
        self._dtype = dtype

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        x = rotate(x, self._rotation).to(self._dtype)
        products = []
        for start, stop in _pieces(len(self._data), self._columns):
            weight = self._values(self._data[start:stop]).to(self._dtype)
            products.append(by_tiles(functional.linear, x, weight, self._tile))
        return _joined(products)

    def _values(self, data: Tensor) -> Tensor:
        """float32 values of some rows, rotated if the type is."""
        if self._integers:
            return data[:, 4:].view(torch.int8).float() * data[:, :4].contiguous().view(torch.float32)
        steps, starts, codes = _groups(data)
        return (codes.float() * steps + starts).view(len(data), self._columns)


def rotation(kind: str, device: torch.device) -> Tensor | None:
    """The matrix of blocks of 64 that rows are rotated by, or None."""
    return _rotation(device) if kind == "INT8_ROW_H64" else None


def rotate(x: Tensor, matrix: Tensor | None) -> Tensor:
    """`x` [n, in] with each 64 values multiplied by `matrix`: a product of one shape for each row, whatever n is."""
    if matrix is None:
        return x
    return torch.bmm(x.reshape(len(x), -1, BLOCK), matrix.expand(len(x), BLOCK, BLOCK)).view(x.shape)


@cache
def _rotation(device: torch.device) -> Tensor:
    return torch.from_numpy(hadamard().copy()).to(device)


@cache
def _no_zero_point() -> Tensor:
    return torch.zeros(1, dtype=torch.int8)


def _joined(products: list[Tensor]) -> Tensor:
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _pieces(rows: int, columns: int) -> list[tuple[int, int]]:
    """Rows that are unpacked together, a multiple of 64 each but the last."""
    step = max(1, UNPACKED_BYTES // (columns * 4 * 64)) * 64
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def _groups(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps and starts, [rows, groups, 1] float32, and codes, [rows, groups, 32] uint8, of rows of Q4_1."""
    blocks = data.view(len(data), -1, _GROUP_BYTES)
    halves = blocks[..., :4].contiguous().view(torch.float16).float()
    codes = torch.cat([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], dim=-1)
    return halves[..., :1], halves[..., 1:], codes


@cache
def probe_integers() -> Way:
    """ "onednn" where this processor's integer products are quick and exact, else "emulated".

    Without VNNI, oneDNN adds pairs of products in 16 bits, which the largest ones overflow.
    """
    try:
        if not torch.cpu._is_vnni_supported():
            return "emulated"
        rows = np.full((64, 4 + 1088), 127, np.uint8)
        rows[:, :4] = np.array([1], "<f4").view(np.uint8)
        rows[::2, 4:] = np.arange(1088) % 256
        x = torch.linspace(-127, 127, 40 * 1088).view(40, 1088)
        x[7:33] = 127.0 - torch.arange(26)[:, None]  # sums above 2**24
        with torch.inference_mode():
            whole = torch.from_numpy(rows)
            quick, exact = (IntegerLinear([whole], "INT8_ROW", way) for way in ("onednn", "emulated"))
            same = all(torch.equal(quick(x[i : i + n]), exact(x)[i : i + n]) for i, n in ((0, 40), (7, 1), (5, 16)))
        return "onednn" if same else "emulated"
    except (AttributeError, RuntimeError):  # this torch has no such product
        return "emulated"


@cache
def probe_int4() -> bool:
    """Whether torch's product with 4-bit weights is quick here and treats a row the same in any company."""
    try:
        if not torch.cpu._is_avx2_supported():
            return False
        numbers = np.random.default_rng(0)
        rows = numbers.integers(0, 256, (128, 256 // _GROUP * _GROUP_BYTES), np.uint8)
        rows.reshape(-1, _GROUP_BYTES)[:, :4] = np.array([0.02, -0.15], "<f2").view(np.uint8)
        x = torch.from_numpy(numbers.standard_normal((70, 256)).astype(np.float32))
        linear = Int4Linear([torch.from_numpy(rows)], 256)
        with torch.inference_mode():
            together = linear(x)
            for count in (1, 2, 3, 5, 8, 16, 17, 33):
                if not torch.equal(torch.cat([linear(x[i : i + count]) for i in range(0, 70, count)]), together):
                    return False
        return True
    except (AttributeError, RuntimeError):
        return False
