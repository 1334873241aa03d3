"""Models that are a file on this machine: copied, so that the store's bytes stay what their hash says."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from llm_os.drivers.store import names, transfer
from llm_os.drivers.store.transfer import StoredFile, Transfer
from llm_os.kernel.errors import StoreError


def fetch(local: names.Local, staged: Path, pull: Transfer) -> tuple[StoredFile, ...]:
    """Copy the file into `staged`."""
    path = Path(local.path).expanduser()
    name = names.file_name(path.name)
    if not path.is_absolute():
        raise StoreError(f"{pull.source}: give an absolute path")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise StoreError(f"{pull.source}: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise StoreError(f"{pull.source}: not a plain file")
    with os.fdopen(descriptor, "rb") as file:
        transfer.require_space(staged, status.st_size, pull.source)
        chunks: Iterator[bytes] = iter(transfer.read_chunks(file.read))
        return (pull.write(chunks, staged / name, limit=status.st_size, phase="downloading"),)
