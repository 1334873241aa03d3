"""Reads safetensors: one file, or the shards of a directory, as views of the mapped files. Never a pickle.

    header length (u64) │ JSON header: name -> dtype, shape, data_offsets │ tensor data

Names are the file's own; `hf_weights` turns them into GGUF's. The header is parsed here and not by the safetensors
library, so that every number in it is checked against the file first and tensors stay views without torch.
"""

from __future__ import annotations

import math
import mmap
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np

from llm_os.drivers.formats.json_files import decode_object, read_object
from llm_os.drivers.formats.mapped import map_file, shown
from llm_os.drivers.formats.quants import KINDS
from llm_os.drivers.formats.weights import WeightTensor
from llm_os.kernel.errors import FormatError, Unsupported

MAX_HEADER = 100_000_000  # the safetensors library's
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 8
MAX_SHARDS = 512  # each holds a file descriptor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_KINDS = ("F32", "F16", "BF16")
_OTHER_DTYPES = (
    *("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F64", "C64"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"),
)

Tensors = dict[str, WeightTensor]


def read_directory(directory: Path) -> Tensors:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises FormatError when there are none, or when a file is damaged.
    """
    if (directory / SINGLE).exists():
        return read_file(directory / SINGLE)
    index = read_object(directory / INDEX)
    if index is None:
        pickles = [
            name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (directory / name).exists()
        ]
        if pickles:
            raise FormatError(
                f"{directory}: has only {pickles[0]}; pickles can run code and are never loaded; convert it to "
                "safetensors"
            )
        raise FormatError(f"{directory}: has neither {SINGLE} nor {INDEX}")
    places = index.get("weight_map")
    if not isinstance(places, dict) or len(places) > MAX_TENSORS:
        raise FormatError(f"{directory / INDEX}: weight_map must be an object with at most {MAX_TENSORS} tensors")
    shards: dict[str, Tensors] = {}
    tensors = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise FormatError(
                f"{directory / INDEX}: weight_map puts {shown(name)} into {shown(shard)}, which is no name of a "
                ".safetensors file beside it"
            )
        if shard not in shards:
            if len(shards) == MAX_SHARDS:
                raise FormatError(f"{directory / INDEX}: weight_map names more than {MAX_SHARDS} files")
            shards[shard] = read_file(directory / shard)
        if name not in shards[shard]:
            raise FormatError(f"{directory / shard}: tensor {shown(name)} is missing, but {INDEX} puts it there")
        tensors[name] = shards[shard][name]
    return tensors


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and len(name) <= 255 and not set(name) & set("/\\\0:")


def read_file(path: Path) -> Tensors:
    """The tensors of one file. Raises ModelNotFound, FormatError, or Unsupported for dtypes other than _KINDS."""
    return _File(map_file(path), str(path)).tensors()


class _File:
    def __init__(self, data: mmap.mmap, file: str) -> None:
        self._data = data
        self._file = file

    def tensors(self) -> Tensors:
        header, start = self._header()
        data = np.frombuffer(self._data, np.uint8)[start:]
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            self._fail(f"has {len(header)} tensors; the limit is {MAX_TENSORS}")
        tensors, spans = {}, []
        for name, info in header.items():
            shape, kind, begin, end = self._info(name, info, len(data))
            spans.append((begin, end, name))
            rows = math.prod(shape[:-1])
            tensors[name] = WeightTensor(name=name, shape=shape, kind=kind, data=data[begin:end].reshape(rows, -1))
        spans.sort()
        for (_, end, name), (begin, _, other) in pairwise(spans):
            if begin < end:
                self._fail(f"tensors {shown(name)} and {shown(other)} overlap")
        return tensors

    def _header(self) -> tuple[dict[str, Any], int]:
        data = self._data
        if data[8:9] != b"{":
            self._refuse_strangers()
        length = int.from_bytes(data[:8], "little")
        if not 2 <= length <= min(MAX_HEADER, len(data) - 8):
            self._fail(
                f"the header length is {length}; it must be from 2 to {min(MAX_HEADER, len(data) - 8)} "
                f"in a file of {len(data)} bytes"
            )
        return decode_object(data[8 : 8 + length], f"{self._file}: header"), 8 + length

    def _refuse_strangers(self) -> NoReturn:
        start = self._data[:4]
        if start == b"PK\x03\x04":
            self._fail(
                "a zip archive (a PyTorch checkpoint?), not safetensors; pickles can run code and are never loaded"
            )
        # From protocol 2 on a pickle starts with its protocol; older ones with a mark, a container or a global.
        if start[:1] == b"\x80" or (start[:1] in (b"(", b")", b"}", b"]", b"c") and self._data[-1:] == b"."):
            self._fail("a pickle, not safetensors; pickles can run code and are never loaded")
        self._fail("not a safetensors file: no JSON header")

    def _info(self, name: str, info: Any, size: int) -> tuple[tuple[int, ...], str, int, int]:
        """Shape, kind, and the place in the data."""
        what = f"tensor {shown(name)}"
        if not isinstance(info, dict):
            self._fail(f"{what} must be described by an object")
        kind, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
        if kind not in _KINDS:
            if kind in _OTHER_DTYPES:
                raise Unsupported(
                    f"{self._file}: {what} has dtype {kind}, which is not supported; supported are {', '.join(_KINDS)}"
                )
            self._fail(f"{what} has dtype {shown(kind)}, which is none of safetensors'")
        if not _are_sizes(shape, 1) or not 1 <= len(shape) <= MAX_DIMENSIONS:
            self._fail(f"{what} has shape {shown(shape)}; it must be 1 to {MAX_DIMENSIONS} positive integers")
        if not _are_sizes(offsets, 0) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
            self._fail(
                f"{what} has data_offsets {shown(offsets)}; they must be ascending and at most {size}, "
                "the bytes after the header; the file is truncated or damaged"
            )
        needed = math.prod(shape) * KINDS[kind].block_bytes
        if offsets[1] - offsets[0] != needed:
            self._fail(f"{what} has {offsets[1] - offsets[0]} bytes; its shape and dtype need {shown(needed)}")
        return tuple(shape), kind, offsets[0], offsets[1]

    def _fail(self, problem: str) -> NoReturn:
        raise FormatError(f"{self._file}: {problem}")


def _are_sizes(value: Any, least: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= least for item in value)
