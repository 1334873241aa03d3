"""Rotary position embedding (Su et al. 2021), half-split layout. Knows positions and head sizes, no model."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_os.drivers.formats.architecture import Rope
from llm_os.drivers.torch.rows import elementwise


class Rotation:
    """cos and sin for the rows of one batch, shared by its layers."""

    def __init__(self, rope: Rope, positions: Tensor) -> None:
        """`positions` [n], integers, on the device of the model."""
        # In float32 and in this order, as transformers does: positions amplify any difference.
        exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64, device=positions.device).float() / rope.dim
        frequencies = 1.0 / (rope.base**exponents)
        if rope.factors is not None:
            frequencies = frequencies / torch.tensor(rope.factors, dtype=torch.float32, device=positions.device)
        angles = positions.float()[:, None] * frequencies
        self._cos = (elementwise(torch.cos, angles) * rope.attention_factor)[:, None, :]
        self._sin = (elementwise(torch.sin, angles) * rope.attention_factor)[:, None, :]
        self._half = rope.dim // 2

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate `x` [n, heads, head_dim]; dimensions past `rope.dim` pass through."""
        first, second, rest = x[..., : self._half], x[..., self._half : 2 * self._half], x[..., 2 * self._half :]
        return torch.cat((first * self._cos - second * self._sin, second * self._cos + first * self._sin, rest), dim=-1)

    def angles(self) -> Tensor:
        """[n, dim]: the cosines of each row, then its sines."""
        return torch.cat((self._cos[:, 0], self._sin[:, 0]), dim=-1)
