"""Token vectors, and how they are held: as the file has them, or as a plain matrix on the device."""

from __future__ import annotations

import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from llm_os.drivers.formats.weights import Weights, WeightTensor
from llm_os.drivers.torch.linear import DenseLinear, Format, Linear

EMBEDDING = "token_embd.weight"


class FileEmbedding:
    """Vectors in the file's type (4 bits, say), dequantized where they are read."""

    def __init__(self, tensor: WeightTensor) -> None:
        self._tensor = structs.replace(tensor, data=tensor.data.copy())  # no view of the file outlives the load

    @property
    def nbytes(self) -> int:
        return self._tensor.data.nbytes

    def rows(self, tokens: list[int]) -> Tensor:
        """[len(tokens), hidden], float32."""
        data = self._tensor.data[np.array(tokens)]
        picked = structs.replace(self._tensor, data=data, shape=(len(tokens), self._tensor.shape[1]))
        return torch.from_numpy(picked.float32())

    def head(self, format: Format) -> Linear:
        """These rows cannot be multiplied: a tied head is a matrix of its own."""
        raise TypeError("an embedding in the file's type is no head")


class DeviceEmbedding:
    """Vectors as a matrix on the device, which a tied head shares."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def rows(self, tokens: list[int]) -> Tensor:
        """[len(tokens), hidden], float32."""
        return self._weight[torch.tensor(tokens, device=self._weight.device)].float()

    def head(self, format: Format) -> Linear:
        """A tied head, which shares the matrix."""
        return DenseLinear(self._weight, format.tile)


def open_embedding(weights: Weights, format: Format) -> FileEmbedding | DeviceEmbedding:
    """Raises FormatError when the model has none."""
    if format.embedding_in_file_type:
        return FileEmbedding(weights[EMBEDDING])
    return DeviceEmbedding(format.dense([weights[EMBEDDING]]))


def embedding_bytes(weights: Weights, format: Format) -> int:
    """What `open_embedding` will hold."""
    tensor = weights[EMBEDDING]
    return (
        tensor.data.nbytes
        if format.embedding_in_file_type
        else tensor.shape[0] * tensor.shape[1] * format.dtype.itemsize
    )
