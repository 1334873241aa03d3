"""Rows of 8-bit integers with one float32 scale each: types that passes make, and that no file has.

    INT8_ROW       scale (float32, little-endian), then one int8 for each value: value = scale * integer
    INT8_ROW_H64   the same of a row that was rotated: each 64 values were multiplied by the Hadamard matrix / 8

A rotation spreads outliers over 64 values, so that one scale suits them all (QuaRot, Ashkboos et al. 2024). It is
orthogonal: whoever multiplies such a matrix with rows rotates the rows likewise, and in exact arithmetic nothing has
changed.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
BLOCK = 64
ROW_KINDS = {"INT8_ROW": 1, "INT8_ROW_H64": BLOCK}  # the numbers of columns must be multiples of these


@cache
def hadamard() -> Floats:
    """The Hadamard matrix of 64 rows, divided by 8: orthogonal, and its own inverse. Do not write to it."""
    matrix = np.full((1, 1), 0.125, np.float32)
    while len(matrix) < BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def encode_rows(values: Floats, kind: str) -> NDArray[np.uint8]:
    """`values` [rows, columns] as [rows, 4 + columns] bytes. A row with NaN or infinity becomes NaN."""
    if kind == "INT8_ROW_H64":
        values = _rotated(values)
    with np.errstate(all="ignore"):
        scale = np.maximum(values.max(1, keepdims=True), -values.min(1, keepdims=True)) / np.float32(127)
        scale[~np.isfinite(scale)] = np.nan
        levels = values / np.where(scale > 0, scale, np.float32(1))
        np.rint(levels, out=levels)
        levels[np.isnan(scale[:, 0])] = 0
        codes = levels.astype(np.int8)
    return np.concatenate([scale.astype("<f4").view(np.uint8), codes.view(np.uint8)], axis=1)


def scales(data: NDArray[np.uint8]) -> Floats:
    """The scale of each row, [rows, 1]."""
    return np.ascontiguousarray(data[:, :4]).view("<f4").astype(np.float32)


def decode_rows(data: NDArray[np.uint8], kind: str, columns: int) -> Floats:
    """The values of rows that `encode_rows` made. Raises ValueError when the bytes do not fit `columns`."""
    if data.ndim != 2 or data.shape[1] != 4 + columns or columns % ROW_KINDS[kind]:
        raise ValueError(f"{kind} data of shape {data.shape} does not hold rows of {columns} values")
    values = data[:, 4:].view(np.int8).astype(np.float32) * scales(data)
    return _rotated(values) if kind == "INT8_ROW_H64" else values


def _rotated(values: Floats) -> Floats:
    rotated: Floats = values.reshape(len(values), -1, BLOCK) @ hadamard()
    return rotated.reshape(values.shape)
