"""Maps files into memory, read-only. Knows no format."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

from llm_os.kernel.errors import FormatError, ModelNotFound


def map_file(path: Path) -> mmap.mmap:
    """The whole file, mapped read-only. It unmaps itself when the last view of it goes, so nobody has to close it.

    Raises ModelNotFound when it cannot be opened, FormatError when it is empty or no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a named pipe would block for ever
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ModelNotFound(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path}: not a regular file")
        if not status.st_size:
            raise FormatError(f"{path}: the file is empty")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be mapped into memory: {error}") from None
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> tuple[object, ...] | None:
    """What tells a file, or the files of a directory, from others of that name and from its own past; None if gone."""
    try:
        names = sorted(path.iterdir()) if path.is_dir() else [path]
        stats = [(name.name, name.stat()) for name in names]
    except (OSError, ValueError):
        return None
    return tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats)


def shown(value: object) -> str:
    """A value from a file, fit for one line of a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
