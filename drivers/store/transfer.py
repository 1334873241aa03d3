"""One pull under way: tells its progress, notices cancellation, and turns bytes into a durable, hashed file.

Does not know where the bytes come from, nor what a model is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from msgspec import Struct

from llm_os.drivers.store import names
from llm_os.kernel.errors import StoreError

CHUNK = 1 << 20

Phase = Literal["resolving", "downloading", "unpacking", "verifying"]


class Progress(Struct, frozen=True):
    """How far a pull is. Several sources may be tried in turn; counts begin again with each phase."""

    phase: Phase
    done_bytes: int
    total_bytes: int | None  # None: not known
    source: str
    note: str = ""  # one line worth showing once: a source that failed and why, or what the pull waits for


class StoredFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a model: its plain name, its length, and the SHA-256 of its content in hex."""

    name: str
    bytes: int
    sha256: str


class Transfer:
    """What every source is given to work with. Not shared between threads."""

    def __init__(
        self,
        model: str,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self.model = model
        self.source = model
        self._progress = progress
        self._cancelled = cancelled
        self.caller_error: OSError | None = None  # raised by the caller's progress, so not the store's trouble

    def report(self, phase: Phase, done: int = 0, total: int | None = None, note: str = "") -> None:
        """Tell the progress. Raises StoreError if the pull was cancelled."""
        self.check_cancelled()
        if self._progress is not None:
            try:
                self._progress(Progress(phase, done, total, self.source, note))
            except OSError as error:
                self.caller_error = error
                raise

    def check_cancelled(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled(f"the pull of {names.shown(self.model)} was cancelled; nothing was left behind")

    def write(
        self, chunks: Iterable[bytes], path: Path, *, limit: int, phase: Phase, done: int = 0, total: int | None = None
    ) -> StoredFile:
        """Write `chunks` to a new file at `path` and sync it. Progress counts from `done` to `total` (`limit` if None).

        Raises StoreError past `limit` bytes, OSError if the file cannot be written. The caller removes what is partial.
        """
        digest, size = hashlib.sha256(), 0
        total = done + limit if total is None else total
        self.report(phase, done, total)
        with path.open("xb") as file:
            for chunk in chunks:
                size += len(chunk)
                if size > limit:
                    raise StoreError(f"{self.source}: {path.name} is longer than the {limit} bytes that were promised")
                file.write(chunk)
                digest.update(chunk)
                self.report(phase, done + size, total)
            file.flush()
            os.fsync(file.fileno())
        return StoredFile(path.name, size, digest.hexdigest())


class Cancelled(StoreError):
    """The caller's `cancelled` said so: no other source is tried."""


class DiskFull(StoreError):
    """There is no room: no other source is tried."""


def require_space(directory: Path, needed: int, what: str) -> None:
    """Raise DiskFull unless `needed` bytes are free where `directory` is."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise DiskFull(
            f"{what} needs {megabytes(needed)} and {megabytes(free)} are free in {directory}; "
            "free some space or set LLM_OS_HOME to another disk"
        )


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def read_chunks(read: Callable[[int], bytes]) -> Iterable[bytes]:
    while chunk := read(CHUNK):
        yield chunk
