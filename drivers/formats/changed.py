"""A model whose weights a pass changes, tensor by tensor, when the driver reads them. Knows no device and no pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, cast

from msgspec import structs

from llm_os.drivers.formats.quants import held_row_bytes
from llm_os.drivers.formats.weights import Weights, WeightTensor
from llm_os.kernel.errors import Closed, Error, PluginError, Unsupported
from llm_os.kernel.image import Image

Change = Callable[[WeightTensor], WeightTensor]
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
_MATRIX = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.weight")


def weight_matrices(image: Image) -> dict[str, tuple[int, int]]:
    """The matrices of a model that multiply rows, which a device can hold in another type: name -> (out, in).

    Those of every layer, and "output.weight", the head, also where the model shares it with its embedding. Raises
    Unsupported for a model without weights.
    """
    weights = weights_of(image)
    found = {name: weights[name].shape for name in weights.names() if _MATRIX.fullmatch(name)}
    found[HEAD] = weights[EMBEDDING if _tied(image) else HEAD].shape
    return {name: (shape[0], shape[1]) for name, shape in found.items()}


def change_weights(image: Image, change: Change | None = None, kept: Mapping[str, str] | None = None) -> Image:
    """The model with other weights; what a pass returns. It takes over `image`, and nothing is read now.

    `change` gets each tensor when the driver reads it, and returns it as it is, or `tensor.replaced(values)`. `kept`
    says which of the `weight_matrices` the device shall hold in which type of `WeightTensor.quantized`; they are
    quantized to it after `change`. A type that an earlier pass asked for stays, unless `kept` names another. A device
    that cannot compute with a type may hold the matrix as it likes. Raises Unsupported for a model without weights, and
    where a type does not fit a matrix.
    """
    known = weight_matrices(image)
    for name, kind in (kept or {}).items():
        if name not in known:
            raise Unsupported(f"{image.name}: {name} is no matrix that can be held in another type")
        held_row_bytes(kind, known[name][1])
    head = EMBEDDING if _tied(image) else HEAD
    weights = ChangedWeights(weights_of(image), change, dict(kept or {}), head, image.name)
    return cast(Image, _ChangedImage(image, weights))


def weights_of(image: Image) -> Weights:
    """Raises Unsupported for a model that has none, such as the simulator's."""
    weights = getattr(image, "weights", None)
    if weights is None:
        raise Unsupported(f"{image.name} has no weights; give a GGUF file or safetensors")
    return cast(Weights, weights)


def outline(weights: Weights, name: str) -> tuple[str, tuple[int, ...]]:
    """The type and shape in which a tensor comes. Does a pass's work only where that changes values, and so perhaps the
    type."""
    kind = weights.kept(name)
    if kind is None or not isinstance(weights, ChangedWeights):
        tensor = weights[name]
        return tensor.kind, tensor.shape
    return kind, stored(weights)[weights.head if name == HEAD else name].shape


def _tied(image: Image) -> bool:
    return bool(getattr(getattr(image, "hyperparameters", None), "tied_embeddings", False))


def stored(weights: Weights) -> Weights:
    """Those of the file, below all changes: for reading ahead."""
    while isinstance(weights, ChangedWeights):
        weights = weights.below
    return weights


class ChangedWeights:
    """`Weights` over others. Keeps none of what it makes."""

    def __init__(self, below: Weights, change: Change | None, kept: dict[str, str], head: str, model: str) -> None:
        """`head` is the tensor that the model's head is: its embedding, where it shares that."""
        self.below = below
        self._change = change
        self._alone = Lock()
        self._kept = kept
        self.head = head
        self._model = model

    def __contains__(self, name: str) -> bool:
        return name in self.below or name in self._kept

    def __getitem__(self, name: str) -> WeightTensor:
        """Raises PluginError, naming the tensor, where the change fails."""
        if name == HEAD and self.below.kept(name) is None:
            tensor = structs.replace(self.below[self.head], name=name)
        else:
            tensor = self.below[name]
        if self._change is not None:
            tensor = self._changed(self._change, tensor)
        kind = self.kept(name)
        return tensor if kind is None else tensor.quantized(kind)

    def _changed(self, change: Change, tensor: WeightTensor) -> WeightTensor:
        try:
            with self._alone:  # a driver may read on several threads; a pass is called by one at a time
                changed = change(tensor)
        except (Error, MemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise PluginError(f"{self._model}: the pass failed at tensor {tensor.name}: {reason}") from error
        if not isinstance(changed, WeightTensor) or changed.shape != tensor.shape:
            got = getattr(changed, "shape", type(changed).__name__)
            raise PluginError(f"{self._model}: the pass made {got} of tensor {tensor.name}, which is {tensor.shape}")
        return changed

    def names(self) -> tuple[str, ...]:
        """Those of the file. A head that is held apart from the embedding, which it is, is not among them."""
        return self.below.names()

    def kept(self, name: str) -> str | None:
        return self._kept.get(name) or self.below.kept(name)

    def close(self) -> None:
        self.below.close()


class _ChangedImage:
    """An image with other weights, and the same in everything else."""

    def __init__(self, image: Image, weights: ChangedWeights) -> None:
        self._image = image
        self._weights = weights
        self._closed = False

    @property
    def weights(self) -> Weights:
        if self._closed:
            raise Closed(f"{self._image.name} is closed")
        return self._weights

    def close(self) -> None:
        self._closed = True
        self._image.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image, name)
