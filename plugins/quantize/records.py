"""Reports that were kept: a file for each model and pass, beside the store's models. A model is known by its content.

    STORE/quantize/SHA256-PASS.json     the report, and the sizes and times of the files that had this SHA-256

Whether a model has a kept report is asked at each load, so that compares sizes and times; the content is hashed when a
report is made.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from llm_os import Config, Image, Store, StoreError
from llm_os.plugins.quantize.report import Report

_LARGEST = 1 << 20
_VERSION = 2  # another one is of compressions that are no more
Files = list[tuple[str, int, int]]


class Record(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A report and what it is about."""

    version: int
    sha256: str
    files: Files
    report: Report


class Records:
    """A folder of records. Nothing is created before the first is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of(cls, config: Config) -> Records:
        """Those of the configuration's store."""
        return cls(Store(config.store).path / "quantize")

    def kept(self, image: Image, name: str) -> Report | None:
        """The report that was kept for this pass of this model, if its files are still the same."""
        path = getattr(image, "path", None)
        if path is None:
            return None
        files = _files(path)
        for file in sorted(self._folder.glob(f"*-{name}.json")) if self._folder.is_dir() else []:
            record = _read(file)
            if record is not None and record.files == files:
                return record.report
        return None

    def keep(self, path: Path, report: Report) -> Path:
        """Write down a report about the model at `path`; where. Raises StoreError."""
        files, sha256 = _files(path), _hash(path)
        record = Record(version=_VERSION, sha256=sha256, files=files, report=report)
        target = self._folder / f"{sha256}-{report.compression}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".record-", delete=False) as new:
                try:
                    new.write(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
                    new.flush()
                    os.fsync(new.fileno())
                    Path(new.name).replace(target)
                except BaseException:
                    with suppress(OSError):
                        Path(new.name).unlink()
                    raise
        except OSError as error:
            raise StoreError(f"{self._folder} cannot be written: {error.strerror or error}; set LLM_OS_HOME") from error
        return target

    def forget(self, path: Path, name: str) -> None:
        """Drop what was kept about this model and pass: it holds no longer."""
        (self._folder / f"{_hash(path)}-{name}.json").unlink(missing_ok=True)


def _read(file: Path) -> Record | None:
    """None for one that is damaged or of another version."""
    try:
        if file.stat().st_size > _LARGEST:
            return None
        record = msgspec.json.decode(file.read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError):
        return None
    return record if record.version == _VERSION else None


def _parts(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def _files(path: Path) -> Files:
    try:
        return [(file.name, stat.st_size, stat.st_mtime_ns) for file in _parts(path) if (stat := file.stat())]
    except OSError:
        return []


def _hash(path: Path) -> str:
    """SHA-256 of a file; of a folder, of the names and hashes of its files. Raises StoreError."""
    try:
        if not path.is_dir():
            with path.open("rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        return hashlib.sha256("".join(f"{file.name} {_hash(file)}\n" for file in _parts(path)).encode()).hexdigest()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
