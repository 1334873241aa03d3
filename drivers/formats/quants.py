"""Types of weights: how many bytes a row takes, and what its values are. Knows nothing of files or models.

In GGML's types a quantized row is a run of blocks; each block holds 32 or 256 values as small integers with shared
scales. The layouts are those of ggml's `ggml-common.h`. `libgguf` (C) does the work where it is installed, numpy where
it is not; both give the same float32 values, bit for bit. `quantize` is numpy alone: the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from llm_os.kernel.errors import Unsupported

try:
    import libgguf
except ImportError:  # no wheel for this Python
    libgguf = None

Blocks = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Kind(Struct, frozen=True):
    """A storage type: GGML's number for it, and how many values a block of how many bytes holds."""

    number: int
    block_values: int
    block_bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` values. Exact only where `columns` is a multiple of `block_values`."""
        return columns // self.block_values * self.block_bytes


KINDS: dict[str, Kind] = {
    "F32": Kind(0, 1, 4),
    "F16": Kind(1, 1, 2),
    "BF16": Kind(30, 1, 2),
    "Q4_0": Kind(2, 32, 18),
    "Q4_1": Kind(3, 32, 20),
    "Q5_0": Kind(6, 32, 22),
    "Q5_1": Kind(7, 32, 24),
    "Q8_0": Kind(8, 32, 34),
    "Q2_K": Kind(10, 256, 84),
    "Q3_K": Kind(11, 256, 110),
    "Q4_K": Kind(12, 256, 144),
    "Q5_K": Kind(13, 256, 176),
    "Q6_K": Kind(14, 256, 210),
}

# Values dequantized at a time by the numpy fallback: bounds its temporaries to some tens of megabytes.
_CHUNK_VALUES = 1 << 20


def dequantize(data: NDArray[np.uint8], kind: str, columns: int) -> NDArray[np.float32]:
    """float32 values of `data`, [rows, bytes per row] of type `kind`, as a fresh array [rows, columns].

    Raises Unsupported for a kind that is not in `KINDS`, ValueError when the bytes per row do not fit `columns`.
    """
    traits = KINDS.get(kind)
    if traits is None:
        raise Unsupported(f"tensor type {kind} is not supported; supported are {', '.join(KINDS)}")
    if columns % traits.block_values or data.ndim != 2 or data.shape[1] != traits.row_bytes(columns):
        raise ValueError(f"{kind} data of shape {data.shape} does not hold rows of {columns} values")
    if traits.block_values == 1:
        return _plain(np.ascontiguousarray(data), kind)
    if libgguf is not None:
        out = np.empty((data.shape[0], columns), np.float32)
        if out.size:
            libgguf.dequantize_rows_into_raw(traits.number, np.ascontiguousarray(data), out, data.shape[0], columns)
        return out
    return dequantize_blocks(data, kind, columns)


def dequantize_blocks(data: NDArray[np.uint8], kind: str, columns: int) -> NDArray[np.float32]:
    """The numpy fallback of `dequantize`, for the quantized kinds."""
    traits, decode = KINDS[kind], _DECODERS[kind]
    out = np.empty((data.shape[0], columns), np.float32)
    rows = max(1, _CHUNK_VALUES // max(1, columns))
    with np.errstate(all="ignore"):  # infinite and NaN scales are the file's business
        for start in range(0, data.shape[0], rows):
            part = np.ascontiguousarray(data[start : start + rows]).reshape(-1, traits.block_bytes)
            out[start : start + rows] = decode(part).reshape(-1, columns)
    return out


HELD = ("Q8_0", "Q4_1")  # what `quantize` makes, and what a pass may ask a device to hold


def held_row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of `columns` values in a kind of HELD. Raises Unsupported for another kind, or if it cannot be."""
    if kind not in HELD:
        raise Unsupported(f"weights cannot be held as {kind}; they can as {', '.join(HELD)}")
    traits = KINDS[kind]
    if columns % traits.block_values:
        raise Unsupported(
            f"rows of {columns} values cannot be held as {kind}; it takes multiples of {traits.block_values}"
        )
    return traits.row_bytes(columns)


def quantize(values: Floats, kind: str) -> Blocks:
    """`values` [rows, columns] as rows of bytes in a kind of HELD. Raises Unsupported as `held_row_bytes` does."""
    held_row_bytes(kind, values.shape[1])
    groups = np.ascontiguousarray(values, np.float32).reshape(-1, 32)
    with np.errstate(all="ignore"):
        blocks = _to_q8_0(groups) if kind == "Q8_0" else _to_q4_1(groups)
    return blocks.reshape(len(values), -1)


def _to_q8_0(groups: Floats) -> Blocks:
    """255 levels around zero. No value is off by more than half a step: where the nearest float16 is too small a step,
    as happens below 2**-14, the next one is taken. A block with NaN, infinity or too much for float16 becomes NaN."""
    largest = np.maximum(groups.max(1, keepdims=True), -groups.min(1, keepdims=True))
    step = (largest / np.float32(127)).astype("<f2")
    step = np.where(step * np.float32(127.4) < largest, np.nextafter(step, np.float16(np.inf)), step)
    step[~np.isfinite(step)] = np.nan
    levels = groups / np.where(step > 0, step, np.float16(1)).astype(np.float32)
    np.rint(levels, out=levels)
    levels[np.isnan(step[:, 0])] = 0
    return np.concatenate([step.astype("<f2").view(np.uint8), levels.astype(np.int8).view(np.uint8)], axis=1)


def _to_q4_1(groups: Floats) -> Blocks:
    """16 levels from the least to the greatest of 32 values. A block with NaN or infinity becomes NaN."""
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step, start = ((high - low) / np.float32(15)).astype("<f2"), low.astype("<f2")
    levels = np.rint((groups - start.astype(np.float32)) / step.astype(np.float32))
    codes = np.nan_to_num(levels, nan=0, posinf=0, neginf=0).clip(0, 15).astype(np.uint8)
    step[~np.isfinite(low + high)] = np.nan
    return np.concatenate([step.view(np.uint8), start.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], axis=1)


def _plain(data: NDArray[np.uint8], kind: str) -> Floats:
    if kind == "F32":
        return data.view("<f4").astype(np.float32)
    if kind == "F16":
        return data.view("<f2").astype(np.float32)
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _half(blocks: Blocks, at: int) -> Floats:
    """The float16 at byte `at` of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(packed: Blocks, bits: int, run: int) -> Blocks:
    """Unpacks fields of `bits`: each `run` bytes give their lowest fields first, then the next ones. [n, values]"""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields = (packed.reshape(len(packed), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)
    return fields.reshape(len(packed), -1)


def _scaled(values: NDArray[Any], scales: Floats) -> Floats:
    """values [n, v] times scales [n, s], each scale for a run of v/s values; shape [n, s, v/s]."""
    n, groups = scales.shape
    result: Floats = values.reshape(n, groups, -1).astype(np.float32) * scales[:, :, None]
    return result


def _fifth_bits(blocks: Blocks, at: int) -> Blocks:
    """The 32 high bits of a Q5 block, each already in place at bit 4."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _scales_and_mins(packed: Blocks) -> tuple[Floats, Floats]:
    """Eight 6-bit scales and eight 6-bit minima from the 12 bytes of Q4_K and Q5_K."""
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=1)
    mins = np.concatenate([mid & 0x3F, (high >> 4) | ((mid >> 2) & 0x30)], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _q4_0(b: Blocks) -> Floats:
    return _scaled(_fields(b[:, 2:], 4, 16).astype(np.int8) - np.int8(8), _half(b, 0))


def _q4_1(b: Blocks) -> Floats:
    return _scaled(_fields(b[:, 4:], 4, 16), _half(b, 0)) + _half(b, 2)[:, :, None]


def _q5_0(b: Blocks) -> Floats:
    values = _fields(b[:, 6:], 4, 16) | _fifth_bits(b, 2)
    return _scaled(values.astype(np.int8) - np.int8(16), _half(b, 0))


def _q5_1(b: Blocks) -> Floats:
    values = _fields(b[:, 8:], 4, 16) | _fifth_bits(b, 4)
    return _scaled(values, _half(b, 0)) + _half(b, 2)[:, :, None]


def _q8_0(b: Blocks) -> Floats:
    return _scaled(b[:, 2:].view(np.int8), _half(b, 0))


def _q2_k(b: Blocks) -> Floats:
    scales = _half(b, 80) * (b[:, :16] & 0x0F).astype(np.float32)
    mins = _half(b, 82) * (b[:, :16] >> 4).astype(np.float32)
    return _scaled(_fields(b[:, 16:80], 2, 32), scales) - mins[:, :, None]


def _q3_k(b: Blocks) -> Floats:
    packed = b[:, 96:108]  # 16 scales of 6 bits: low nibbles in bytes 0-7, high pairs in bytes 8-11
    scales = (_fields(packed[:, :8], 4, 8) | (_fields(packed[:, 8:], 2, 4) << np.uint8(4))).astype(np.int8)
    values = _fields(b[:, 32:96], 2, 32).astype(np.int8)
    values -= (_fields(b[:, :32], 1, 32) ^ np.uint8(1)).astype(np.int8) << np.int8(2)  # a clear mask bit means -4
    return _scaled(values, _half(b, 108) * (scales - np.int8(32)).astype(np.float32))


def _q4_k(b: Blocks) -> Floats:
    scales, mins = _scales_and_mins(b[:, 4:16])
    return _scaled(_fields(b[:, 16:], 4, 32), _half(b, 0) * scales) - (_half(b, 2) * mins)[:, :, None]


def _q5_k(b: Blocks) -> Floats:
    scales, mins = _scales_and_mins(b[:, 4:16])
    values = _fields(b[:, 48:], 4, 32) | (_fields(b[:, 16:48], 1, 32) << np.uint8(4))
    return _scaled(values, _half(b, 0) * scales) - (_half(b, 2) * mins)[:, :, None]


def _q6_k(b: Blocks) -> Floats:
    values = _fields(b[:, :128], 4, 64) | (_fields(b[:, 128:192], 2, 32) << np.uint8(4))
    scales = _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    return _scaled(values.astype(np.int8) - np.int8(32), scales)


_DECODERS: dict[str, Callable[[Blocks], Floats]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
