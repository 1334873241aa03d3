"""Weights as both file formats offer them: named, typed, still in the file. Dequantizing is in `quants`."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

_PART_VALUES = 1 << 20  # values that `quantized` has as float32 at a time


class WeightTensor(Struct, frozen=True, kw_only=True):
    """One tensor: `data` is a view of the file, [rows, bytes per row], rows being all dimensions but the last.

    `kind` is a GGML type name: "F32", "F16", "BF16", "Q4_1", ...
    Blocks of a quantized type lie along the last dimension, so rows can be taken, permuted and concatenated freely.
    """

    name: str
    shape: tuple[int, ...]  # torch's order: (out_features, in_features)
    kind: str
    data: NDArray[np.uint8]

    def float32(self) -> NDArray[np.float32]:
        """The values, dequantized, in `shape`. A fresh array."""
        from llm_os.drivers.formats.quants import dequantize

        return dequantize(self.data, self.kind, self.shape[-1]).reshape(self.shape)

    def replaced(self, values: NDArray[np.float32]) -> WeightTensor:
        """The tensor with other `values`, float32, of the same shape."""
        rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
        return WeightTensor(name=self.name, shape=values.shape, kind="F32", data=rows.view(np.uint8))

    def quantized(self, kind: str) -> WeightTensor:
        """The tensor in another type: "Q8_0" or "Q4_1", both of 32 values each.

        A million values at a time. Raises Unsupported for another type, or where the rows do not fit it.
        """
        from llm_os.drivers.formats.quants import dequantize, held_row_bytes, quantize

        if self.kind == kind:
            return self
        columns = self.shape[-1]
        data = np.empty((len(self.data), held_row_bytes(kind, columns)), np.uint8)
        step = max(1, _PART_VALUES // columns)
        for start in range(0, len(data), step):
            part = slice(start, start + step)
            data[part] = quantize(dequantize(self.data[part], self.kind, columns), kind)
        return WeightTensor(name=self.name, shape=self.shape, kind=kind, data=data)


class Weights(Protocol):
    """The tensors of one model, by GGUF's names ("blk.0.attn_q.weight") and conventions.

    Conventions, whatever the file: query and key rows in half-split rope order (GGUF's llama files are stored
    interleaved and come back un-permuted); norm weights ready to multiply (gemma's +1 already added).
    """

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> WeightTensor:
        """Raises FormatError, naming the file, when the tensor is missing."""
        ...

    def names(self) -> tuple[str, ...]: ...

    def kept(self, name: str) -> str | None:
        """The type in which a device holds this matrix, because a pass asks for it; None: as suits the device.

        Reads no contents. The tensor comes in that type."""
        ...

    def close(self) -> None: ...
