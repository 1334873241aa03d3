"""Reads the JSON files of a model directory, bounded in size and in the number of values. Knows none of their keys."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec

from llm_os.kernel.errors import FormatError

MAX_BYTES = 32 << 20
MAX_VALUES = 1 << 20  # about: counted by commas and opening brackets
OBJECT_SHARE = 8  # one value in so many may be an object: those take about that much more memory


def decode_object(data: bytes, file: str, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object in `data`. Raises FormatError when it is none."""
    objects = data.count(b"{")
    if data.count(b",") + data.count(b"[") + objects > max_values:
        raise FormatError(f"{file}: has more than {max_values} JSON values")
    if objects > max_values // OBJECT_SHARE:
        raise FormatError(f"{file}: has more than {max_values // OBJECT_SHARE} JSON objects")
    try:
        value = msgspec.json.decode(data)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise FormatError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file}: must hold a JSON object")
    return value


def read_text(path: Path, limit: int = MAX_BYTES) -> str | None:
    """A small UTF-8 file; None when it does not exist. Raises FormatError when it is too large or cannot be read."""
    data = read_bytes(path, limit)
    if data is None:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not valid UTF-8") from None


def read_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any] | None:
    """A small JSON file that holds an object; None when it does not exist. Raises FormatError."""
    data = read_bytes(path, limit)
    return None if data is None else decode_object(data, str(path))


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes | None:
    """A small file; None when it does not exist. Raises FormatError when it is too large, or no regular file."""
    try:
        with open(path, "rb", opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{path}: not a regular file")
            if status.st_size > limit:
                raise FormatError(f"{path}: has {status.st_size} bytes; the limit is {limit}")
            return file.read(status.st_size)  # allocates as much as it is asked for
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe would block for ever
