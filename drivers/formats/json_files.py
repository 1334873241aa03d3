"""Reads the JSON files of a model directory, bounded in size and in the number of values. Knows none of their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from llm_os.kernel.errors import FormatError

MAX_BYTES = 32 << 20
MAX_VALUES = 1 << 20  # about: counted by commas


def decode_object(data: bytes, file: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises FormatError when it is none."""
    if data.count(b",") > MAX_VALUES:
        raise FormatError(f"{file}: has more than {MAX_VALUES} JSON values")
    try:
        value = msgspec.json.decode(data)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise FormatError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file}: must hold a JSON object")
    return value


def read_text(path: Path, limit: int = MAX_BYTES) -> str | None:
    """A small UTF-8 file; None when it does not exist. Raises FormatError when it is too large or cannot be read."""
    data = _read(path, limit)
    if data is None:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not valid UTF-8") from None


def read_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any] | None:
    """A small JSON file that holds an object; None when it does not exist. Raises FormatError."""
    data = _read(path, limit)
    return None if data is None else decode_object(data, str(path))


def _read(path: Path, limit: int) -> bytes | None:
    try:
        if not path.exists():
            return None
        if not path.is_file():  # a named pipe would block for ever
            raise FormatError(f"{path}: not a regular file")
        size = path.stat().st_size
        if size > limit:
            raise FormatError(f"{path}: has {size} bytes; the limit is {limit}")
        with path.open("rb") as file:
            return file.read(size)  # allocates as much as it is asked for
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None
