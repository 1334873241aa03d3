"""Reads GGUF files, versions 2 and 3: metadata as Python values, tensors as views of the mapped file.

    magic, version, counts │ key-value pairs │ tensor infos │ padding │ tensor data, each aligned
    └──────────────────────── the header ─────────────────┘

Every count, length, type, dimension and offset is checked against the file before anything is allocated or looped over,
so a hostile file costs no more time and memory than a sound one of its size. Does not know what the keys and tensors
mean: see `gguf_architecture`, `gguf_weights` and `tokenizer`.
"""

from __future__ import annotations

import mmap
from itertools import pairwise
from pathlib import Path
from struct import Struct as Layout
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from llm_os.drivers.formats.mapped import map_file, shown
from llm_os.drivers.formats.quants import KINDS
from llm_os.drivers.formats.weights import WeightTensor
from llm_os.kernel.errors import Closed, FormatError, Unsupported

MAGIC = b"GGUF"

# Far above any real model (a vocabulary of 262,144 tokens makes a header of 16 MB), low enough to bound memory.
MAX_HEADER = 128 << 20
MAX_STRING = 16 << 20
MAX_KEY = 65_535  # the specification's
MAX_TENSOR_NAME = 255
MAX_ELEMENTS = 1 << 22  # of all arrays together
MAX_DEPTH = 4  # of arrays in arrays
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
ALIGNMENTS = (8, 1 << 16)  # least and greatest

_KIND_OF_NUMBER = {kind.number: name for name, kind in KINDS.items()}
_OTHER_KINDS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

_U32 = Layout("<I")
_U64 = Layout("<Q")
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING = 8
_ARRAY = 9


class GgufFile:
    """An open GGUF file: `metadata`, and tensors by name as in `Weights`, in the file's own conventions.

    The file stays mapped until it is closed and the last view of it is gone. Immutable, so safe to share by threads.
    Raises ModelNotFound when there is no such file, FormatError when it is damaged, Unsupported for versions and tensor
    types that this reader does not know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = _Header(map_file(path), str(path))
        self.version = header.start()
        tensors, keys = header.counts()
        self.metadata: dict[str, Any] = header.metadata(keys)
        self._tensors: dict[str, WeightTensor] | None = header.tensors(tensors, self.metadata)

    def __contains__(self, name: str) -> bool:
        return name in self._open()

    def __getitem__(self, name: str) -> WeightTensor:
        tensor = self._open().get(name)
        if tensor is None:
            raise FormatError(f"{self.path}: tensor {name} is missing")
        return tensor

    def names(self) -> tuple[str, ...]:
        return tuple(self._open())

    def close(self) -> None:
        """Drops the views; the mapping goes with the last one that a caller still holds. Idempotent."""
        self._tensors = None

    def _open(self) -> dict[str, WeightTensor]:
        if (tensors := self._tensors) is None:
            raise Closed(f"{self.path} is closed")
        return tensors


class _Header:
    """The parser: a position in the mapped file, moved past each field once that is known to lie in the file."""

    def __init__(self, data: mmap.mmap, file: str) -> None:
        self._data = data
        self._file = file
        self._at = 0
        self._end = min(len(data), MAX_HEADER)
        self._elements = MAX_ELEMENTS

    def start(self) -> int:
        """Reads magic and version."""
        if self._data[:4] != MAGIC:
            self._fail(f"not a GGUF file: it starts with {self._data[:4]!r} and not with {MAGIC!r}")
        self._at = 4
        version = self._u32("version")
        if version and not version & 0xFFFF:
            raise Unsupported(f"{self._file}: a big-endian GGUF file; convert it to little-endian")
        if version not in (2, 3):
            raise Unsupported(f"{self._file}: GGUF version {version} is not supported; supported are 2 and 3")
        return version

    def counts(self) -> tuple[int, int]:
        """Numbers of tensors and of metadata keys. A tensor info has at least 32 bytes, a key-value pair 13."""
        tensors = self._count("tensor count", MAX_TENSORS, 32)
        return tensors, self._count("metadata count", MAX_KEYS, 13)

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for index in range(count):
            key = self._string(f"metadata key {index}", MAX_KEY)
            if key in values:
                self._fail(f"metadata key {shown(key)} appears twice")
            what = f"metadata {shown(key)}"
            values[key] = self._value(self._u32(f"{what} type"), what, 0)
        return values

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, WeightTensor]:
        infos: dict[str, tuple[tuple[int, ...], str, int]] = {}
        for index in range(count):
            name = self._string(f"name of tensor {index}", MAX_TENSOR_NAME)
            if name in infos:
                self._fail(f"tensor {shown(name)} appears twice")
            infos[name] = self._tensor_info(f"tensor {shown(name)}")
        alignment = self._alignment(metadata)
        start = -(-self._at // alignment) * alignment
        data = np.frombuffer(self._data, np.uint8)
        tensors, spans = {}, []
        for name, (shape, kind, offset) in infos.items():
            rows, row_bytes = _rows(shape), KINDS[kind].row_bytes(shape[-1])
            begin, size = start + offset, rows * row_bytes
            if offset % alignment:
                self._fail(f"tensor {shown(name)} has offset {offset}, no multiple of the alignment {alignment}")
            if begin + size > len(data):
                self._fail(
                    f"tensor {shown(name)} takes bytes {begin} to {begin + size}, but the file has {len(data)}; "
                    "it is truncated or damaged"
                )
            spans.append((begin, begin + size, name))
            view = data[begin : begin + size].reshape(rows, row_bytes)
            tensors[name] = WeightTensor(name=name, shape=shape, kind=kind, data=view)
        spans.sort()
        for (_, end, name), (begin, _, other) in pairwise(spans):
            if begin < end:
                self._fail(f"tensors {shown(name)} and {shown(other)} overlap at byte {begin}")
        return tensors

    def _tensor_info(self, what: str) -> tuple[tuple[int, ...], str, int]:
        """Shape in torch's order, kind, and offset from the start of the data."""
        dimensions = self._u32(f"number of dimensions of {what}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self._fail(f"{what} has {dimensions} dimensions; it must have 1 to {MAX_DIMENSIONS}")
        sizes = [self._u64(f"dimension {i} of {what}") for i in range(dimensions)]
        if not all(sizes):
            self._fail(f"{what} has a dimension of 0")
        number = self._u32(f"type of {what}")
        offset = self._u64(f"offset of {what}")
        kind = _KIND_OF_NUMBER.get(number)
        if kind is None:
            if number in _OTHER_KINDS:
                raise Unsupported(
                    f"{self._file}: {what} has type {_OTHER_KINDS[number]}, which is not supported; "
                    f"supported are {', '.join(KINDS)}"
                )
            self._fail(f"{what} has type number {number}, which is none of GGML's")
        if sizes[0] % KINDS[kind].block_values:
            self._fail(f"{what} has rows of {sizes[0]} values, no multiple of {kind}'s {KINDS[kind].block_values}")
        return tuple(reversed(sizes)), kind, offset

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        least, greatest = ALIGNMENTS
        if type(alignment) is not int or not least <= alignment <= greatest or alignment & (alignment - 1):
            self._fail(f"general.alignment is {shown(alignment)}; it must be a power of two, {least} to {greatest}")
        return alignment

    def _value(self, kind: int, what: str, depth: int) -> Any:
        if kind == _STRING:
            return self._string(what, MAX_STRING)
        if kind in _SCALARS:
            return self._scalars(kind, 1, what)[0]
        if kind != _ARRAY:
            self._fail(f"{what} has value type {kind}; types are 0 to 12")
        if depth == MAX_DEPTH:
            self._fail(f"{what} has arrays nested more than {MAX_DEPTH} deep")
        element = self._u32(f"element type of {what}")
        if element in _SCALARS:
            return self._scalars(element, self._count(f"length of {what}", self._elements, 1), what)
        least = 8 if element == _STRING else 12
        count = self._count(f"length of {what}", self._elements, least)
        self._elements -= count
        if element == _STRING:
            return self._strings(count, what)
        return [self._value(element, what, depth + 1) for _ in range(count)]

    def _scalars(self, kind: int, count: int, what: str) -> list[Any]:
        layout = np.dtype(_SCALARS[kind])
        if not count:
            return []
        at = self._take(count * layout.itemsize, what)
        self._elements -= count
        raw: NDArray[Any] = np.frombuffer(self._data, np.uint8, count * layout.itemsize, at)
        # A byte that is neither 0 nor 1 is no valid numpy bool, and reading it as one is undefined.
        values: list[Any] = (raw != 0).tolist() if kind == 7 else raw.view(layout).tolist()
        return values

    def _strings(self, count: int, what: str) -> list[str]:
        """The hot loop: a vocabulary and its merges are hundreds of thousands of these.

        Tokens may be any bytes; what is not UTF-8 becomes surrogate escapes.
        """
        data, at, end, length_at = self._data, self._at, self._end, _U64.unpack_from
        strings = []
        for _ in range(count):
            if at + 8 > end:
                break
            stop = at + 8 + length_at(data, at)[0]
            if stop > end or stop - at - 8 > MAX_STRING:
                break
            strings.append(str(data[at + 8 : stop], "utf-8", "surrogateescape"))
            at = stop
        self._at = at
        if len(strings) < count:
            self._string(f"string {len(strings)} of {what}", MAX_STRING)  # says what is wrong with it
        return strings

    def _string(self, what: str, limit: int) -> str:
        length = self._u64(f"length of {what}")
        if length > limit:
            self._fail(f"{what} has {length} bytes; the limit is {limit}")
        at = self._take(length, what)
        try:
            return str(self._data[at : at + length], "utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what} is not valid UTF-8")

    def _count(self, what: str, limit: int, least_bytes: int) -> int:
        """A count of things of at least `least_bytes` each: at most the limit, and as many as the file can hold."""
        count = self._u64(what)
        if count > limit:
            self._fail(f"{what} is {count}; the limit is {limit}")
        if count * least_bytes > self._end - self._at:
            left = self._end - self._at
            self._fail(
                f"{what} is {count}, which needs {count * least_bytes} bytes; {left} are left: truncated or damaged"
            )
        return count

    def _u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self._data, self._take(4, what))[0]
        return value

    def _u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self._data, self._take(8, what))[0]
        return value

    def _take(self, size: int, what: str) -> int:
        """Moves past `size` bytes and returns where they start."""
        at = self._at
        if size > self._end - at:
            if self._end == MAX_HEADER < len(self._data):
                self._fail(f"the header exceeds {MAX_HEADER} bytes at {what}")
            self._fail(f"the file ends at byte {len(self._data)}, within {what}; it is truncated or damaged")
        self._at = at + size
        return at

    def _fail(self, problem: str) -> NoReturn:
        raise FormatError(f"{self._file}: {problem}")


def _rows(shape: tuple[int, ...]) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows
