"""A GGUF file's tensors in the conventions of `Weights`. Knows which rows llama.cpp's converter moved, nothing else."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.formats.gguf import GgufFile
from llm_os.drivers.formats.quants import KINDS
from llm_os.drivers.formats.weights import WeightTensor
from llm_os.kernel.errors import Unsupported

_QUERIES_OR_KEYS = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


class GgufWeights:
    """`Weights` of a GGUF file. Tensors are views of the file, but for the queries and keys of the llama family.

    Those are stored for interleaved rope, with rows (0, d/2, 1, d/2 + 1, ...) of each head, and come back as a copy in
    half-split order (0, 1, ...): the inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
    """

    def __init__(self, file: GgufFile, architecture: Architecture) -> None:
        self._file = file
        self._architecture = architecture

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def __getitem__(self, name: str) -> WeightTensor:
        tensor = self._file[name]
        if self._architecture.family != "llama" or not (match := _QUERIES_OR_KEYS.fullmatch(name)):
            return tensor
        heads = self._architecture.heads if match[1] == "q" else self._architecture.kv_heads
        if match[2] == "weight":
            return _with_data(tensor, self._half_split(tensor.data, heads))
        if KINDS[tensor.kind].block_values != 1:
            raise Unsupported(f"{self._file.path}: tensor {name} has type {tensor.kind}; a bias must not be quantized")
        values = tensor.data.reshape(tensor.shape[0], KINDS[tensor.kind].block_bytes)  # one value a row
        return _with_data(tensor, self._half_split(values, heads).reshape(1, -1))

    def names(self) -> tuple[str, ...]:
        return self._file.names()

    def kept(self, name: str) -> str | None:
        return None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._file[name].shape for name in self._file.names()}

    def close(self) -> None:
        self._file.close()

    def _half_split(self, rows: NDArray[np.uint8], heads: int) -> NDArray[np.uint8]:
        """Puts the rotated rows of each head into half-split order; rows beyond the rotated ones stay."""
        rotated = self._architecture.layers[0].rope.dim
        by_head = rows.reshape(heads, -1, rows.shape[-1]).copy()
        pairs = by_head[:, :rotated].reshape(heads, rotated // 2, 2, -1)
        by_head[:, :rotated] = pairs.swapaxes(1, 2).reshape(heads, rotated, -1)
        return by_head.reshape(rows.shape)


def _with_data(tensor: WeightTensor, data: NDArray[np.uint8]) -> WeightTensor:
    return WeightTensor(name=tensor.name, shape=tensor.shape, kind=tensor.kind, data=data)
