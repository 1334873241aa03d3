"""Weights as both file formats offer them: named, typed, still in the file. Dequantizing is in `quants`."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray


class WeightTensor(Struct, frozen=True, kw_only=True):
    """One tensor: `data` is a view of the file, [rows, bytes per row], rows being all dimensions but the last.

    `kind` is a GGML type name: "F32", "F16", "BF16", "Q4_1", ... Blocks of a quantized type lie along the last
    dimension, so rows can be taken, permuted and concatenated freely.
    """

    name: str
    shape: tuple[int, ...]  # torch's order: (out_features, in_features)
    kind: str
    data: NDArray[np.uint8]

    def float32(self) -> NDArray[np.float32]:
        """The values, dequantized, in `shape`. A fresh array."""
        from llm_os.drivers.formats.quants import dequantize

        return dequantize(self.data, self.kind, self.shape[-1]).reshape(self.shape)


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

    def close(self) -> None: ...
