"""Arithmetic on rows that treats each row the same whoever its neighbours are. Knows nothing of models or pages.

In torch the bits of a result may depend on where an element lies: a matrix product picks another kernel for another
number of rows, and vectorised functions finish the odd end of their work with scalar code that rounds differently.
Everything here fixes the shape of the work, so that a row gives the same bits in any batch. `+ - * /` and `sqrt` are
exact by IEEE 754 and need no care; sums and maxima over the last dimension were measured to see only their own row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Two vectors of the widest instruction set: vectorised loops take this many elements at a time.
_LANES = 32
# Below the 32768 elements from which torch splits a loop over threads at places that depend on its length.
_PIECE = 16384


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` (exp, cos, silu, ...) of each element of `x`; an element sees at most its own row (last dimension).

    Rows are padded to whole vectors and worked on in pieces of whole vectors, each too small to be split over threads.
    """
    if x.device.type != "cpu":  # a GPU computes every element by itself
        return function(x)
    width = x.shape[-1]
    padded = functional.pad(x, (0, -width % _LANES)) if width % _LANES else x
    flat = padded.reshape(-1)
    pieces = [function(flat[start : start + _PIECE]) for start in range(0, len(flat), _PIECE)]
    y = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return y.view(padded.shape)[..., :width]


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) (Elfwing et al. 2017)."""
    return elementwise(functional.silu, x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016)."""
    return elementwise(lambda piece: functional.gelu(piece, approximate="tanh"), x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu_tanh": gelu_tanh}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension of a float32 `x`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def by_tiles(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, tile: int) -> Tensor:
    """The products of `x` [n, in], in float32, from tiles of exactly `tile` rows; the last is padded with zeros."""
    rows = len(x)
    if rows % tile:
        x = functional.pad(x, (0, 0, 0, -rows % tile))
    products = [multiply(x[start : start + tile], weight) for start in range(0, len(x), tile)]
    product = products[0] if len(products) == 1 else torch.cat(products)
    return product[:rows].float()
