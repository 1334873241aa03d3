"""Matrices that a pass asked to hold in fewer bytes, dequantized some rows at a time. Knows no model.

This is how they are multiplied wherever there is no native code for it: in exact mode, on a GPU, and where a model's
sizes do not fit. It saves memory and costs time. The fast way on a CPU is in `drivers/native`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llm_os.drivers.torch.rows import by_tiles

UNPACKED_BYTES = 4 << 20  # of float32 values that a product has unpacked at a time
_GROUP = 32


class UnpackedLinear:
    """Rows of Q8_0 or Q4_1, as bytes, on any device. A row of a product does not depend on the others."""

    def __init__(self, data: Tensor, kind: str, columns: int, tile: int, dtype: torch.dtype) -> None:
        self._data = data
        self._kind = kind
        self._columns = columns
        self._tile = tile
        self._dtype = dtype

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        products = []
        step = max(1, UNPACKED_BYTES // (self._columns * 4 * 64)) * 64
        for rows in torch.split(self._data, step):
            weight = self._values(rows).to(self._dtype)
            products.append(by_tiles(functional.linear, x, weight, self._tile))
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def _values(self, rows: Tensor) -> Tensor:
        """float32, the same bits as `dequantize` gives."""
        groups = rows.view(len(rows), self._columns // _GROUP, -1)
        values = torch.empty(*groups.shape[:2], _GROUP, device=rows.device)
        if self._kind == "Q8_0":
            steps, codes = groups[..., :2].contiguous(), groups[..., 2:]
            torch.mul(codes.view(torch.int8), steps.view(torch.float16).float(), out=values)
        else:
            halves, pairs = groups[..., :4].contiguous().view(torch.float16).float(), groups[..., 4:].contiguous()
            values[..., :16], values[..., 16:] = pairs & 15, pairs >> 4
            values.mul_(halves[..., :1]).add_(halves[..., 1:])
        return values.view(len(rows), -1)
