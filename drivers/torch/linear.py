"""Weight formats: how a matrix is held, and its product with rows. The seam for faster formats; knows no model.

A format promises two things. A row's product does not depend on the other rows: every call multiplies a tile of exactly
`tile` rows, because for another number of rows a matrix library picks another kernel, which rounds differently. And it
holds exactly the bytes that `nbytes` says, which is what the kernel's ledger was told.

Matrices are held as float32 (or bfloat16), whatever the file's type, unless a pass asks for another type: those are in
`quantized`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, cast

import numpy as np
import torch
from msgspec import Struct, structs
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from llm_os.drivers.formats.quants import held_row_bytes
from llm_os.drivers.formats.weights import Weights, WeightTensor
from llm_os.drivers.torch.quantized import UnpackedLinear
from llm_os.drivers.torch.rows import by_tiles

PART_BYTES = 32 << 20  # of float32 values dequantized at a time while loading
Floats = NDArray[np.float32]


class Linear(Protocol):
    """A weight [out, in] that multiplies rows."""

    @property
    def nbytes(self) -> int:
        """Bytes held for it."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [n, in] float32 to [n, out] float32; any n."""
        ...


class DenseLinear:
    """A plain matrix in `dtype`, for any shape and any device."""

    def __init__(self, weight: Tensor, tile: int) -> None:
        self._weight = weight
        self._tile = tile

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return by_tiles(functional.linear, x.to(self._weight.dtype), self._weight, self._tile)


class PackedLinear:
    """A matrix in oneDNN's blocked layout, made once: a third to ten times faster on a CPU than the plain one."""

    def __init__(self, parts: Iterable[Tensor], tile: int) -> None:
        """`parts` are consecutive rows of the matrix. Each is packed on its own, so that no second copy of a large
        matrix is ever held."""
        self._parts: list[Tensor] = []
        for part in parts:
            self._dtype = part.dtype
            self._parts.append(torch.ops.mkldnn._reorder_linear_weight(part, tile))
        self._tile = tile

    @property
    def nbytes(self) -> int:
        return sum(int(torch.ops.mkldnn._nbytes(part)) for part in self._parts)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        products = [by_tiles(_multiply_packed, x, part, self._tile) for part in self._parts]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    @staticmethod
    def fits(rows: int, columns: int) -> bool:
        """Whether the blocked layout takes no more room than the plain one."""
        return rows % 64 == 0 and columns % 64 == 0


def _multiply_packed(x: Tensor, weight: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))


def _dequantized(tensors: list[WeightTensor]) -> Iterator[Tensor]:
    """float32 rows of all `tensors` in order, at most PART_BYTES (but 64 rows) at a time."""
    limit = max(1, PART_BYTES // (tensors[0].shape[1] * 4 * 64)) * 64
    pending: list[Floats] = []
    count = 0
    for tensor in tensors:
        start = 0
        while start < tensor.shape[0]:
            stop = min(tensor.shape[0], start + limit - count)
            piece = structs.replace(tensor, data=tensor.data[start:stop], shape=(stop - start, tensor.shape[1]))
            pending.append(piece.float32())
            count += stop - start
            start = stop
            if count == limit:
                yield torch.from_numpy(pending[0] if len(pending) == 1 else np.concatenate(pending))
                pending, count = [], 0
    if pending:
        yield torch.from_numpy(pending[0] if len(pending) == 1 else np.concatenate(pending))


class Format(Struct, frozen=True):
    """How weights are held on one device at one precision."""

    dtype: torch.dtype
    tile: int  # rows of every matrix product
    packed: bool  # oneDNN's layout, where the shape allows it
    device: torch.device
    embedding_in_file_type: bool  # rows of the embedding are dequantized on the host, where they are read

    def linear(self, weights: Weights, names: list[str]) -> Linear:
        """One matrix from the rows of several, which have the same number of columns."""
        tensors = [weights[name] for name in names]
        rows, columns = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
        kind = _kept(weights, names)
        if kind is not None:
            data = np.concatenate([tensor.data for tensor in tensors])  # no view of the file outlives the load
            return UnpackedLinear(torch.from_numpy(data).to(self.device), kind, columns, self.tile, self.dtype)
        if self.packed and PackedLinear.fits(rows, columns):
            return PackedLinear((part.to(self.dtype) for part in _dequantized(tensors)), self.tile)
        return DenseLinear(self.dense(tensors), self.tile)

    def dense(self, tensors: list[WeightTensor]) -> Tensor:
        """The rows of `tensors` as one plain matrix on the device."""
        rows = sum(tensor.shape[0] for tensor in tensors)
        weight = torch.empty(rows, tensors[0].shape[1], dtype=self.dtype, device=self.device)
        filled = 0
        for part in _dequantized(tensors):
            weight[filled : filled + len(part)] = part
            filled += len(part)
        return weight

    def nbytes(self, weights: Weights, names: list[str], rows: int, columns: int) -> int:
        """What `linear` will hold for a weight of this shape. Reads no contents."""
        kind = _kept(weights, names)
        if kind is None:
            return rows * columns * self.dtype.itemsize
        return rows * held_row_bytes(kind, columns)

    def kept_bytes(self, weights: Weights, names: list[str], rows: int, columns: int) -> int:
        """What `linear` has besides, while it loads: the matrix as a pass made it. 0 where the file has it."""
        return 0 if _kept(weights, names) is None else self.nbytes(weights, names, rows, columns)


def _kept(weights: Weights, names: list[str]) -> str | None:
    """The type that all of them shall be held in, if there is one."""
    kinds = {weights.kept(name) for name in names}
    return kinds.pop() if len(kinds) == 1 else None


def choose_format(precision: str, device: torch.device) -> Format:
    """The format for "exact" (float32, the reference) or "fast".

    On a CPU both are float32: fast is what native code does not take (`drivers/native`), and bfloat16 changed answers
    (docs/decisions/0004). A tile of 16 rows costs 1.7 times one row.
    """
    if device.type == "cpu":
        packed = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return Format(torch.float32, 16, packed, device, True)
    return Format(torch.bfloat16 if precision == "fast" else torch.float32, 16, False, device, False)
