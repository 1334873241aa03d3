"""The store on disk: which models are there, and the moment at which a finished download becomes one.

    content/<sha256>/<file>...        the bytes, shared by all models with that hash; complete and synced, or not there
    manifests/<key of model>.json     what the model is called, where it came from, which files it has
    partial/<key of model>.<random>/  a pull under way; partial/<key>.lock is held by the process that owns it
    partial/store.lock                held while content and manifests change

A pull that dies leaves only things under partial/ or content that no manifest names; `sweep` removes both. Nothing here
follows a link out of the store. Does not know the network, aliases, or what is in a model file.
"""

from __future__ import annotations

import glob
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from llm_os.drivers.store import lock, names
from llm_os.drivers.store.transfer import StoredFile
from llm_os.kernel.errors import StoreError

_LONGEST_MANIFEST = 4 << 20


class StoredModel(Struct, frozen=True):
    """A model in the store. `path` is what `open_image` takes: a GGUF file, or a directory of safetensors."""

    name: str
    source: str
    bytes: int
    sha256: str
    path: Path
    pulled_at: datetime


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    model: str
    source: str
    sha256: str
    directory: bool
    files: tuple[StoredFile, ...]
    pulled_at: datetime


class Shelf:
    """The store at `root`. Holds no state besides: threads and processes may share one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content = root / "content"
        self.manifests = root / "manifests"
        self.partial = root / "partial"

    def create(self) -> None:
        """Make the directories. Raises StoreError if one of them is a link, OSError if they cannot be written."""
        for directory in (self.content, self.manifests, self.partial):
            directory.mkdir(parents=True, exist_ok=True)
            if directory.is_symlink():
                raise StoreError(f"{directory} is a link; the model store writes only to real directories of its own")

    def find(self, model: str) -> StoredModel | None:
        """The model if its manifest is sound and its files are there in full length. Raises StoreError if damaged."""
        path = self._manifest_path(model)
        return self._stored(path) if os.path.lexists(path) else None

    def list(self) -> tuple[tuple[StoredModel, ...], tuple[str, ...]]:
        """The sound models, sorted by name, and one line for each manifest that cannot be used."""
        sound: list[StoredModel] = []
        problems: list[str] = []
        for path in self._manifest_paths():
            try:
                sound.append(self._stored(path))
            except StoreError as error:
                problems.append(str(error))
        return tuple(sorted(sound, key=lambda model: model.name)), tuple(problems)

    def put(
        self, model: str, source: str, directory: bool, files: tuple[StoredFile, ...], staged: Path, work: Path
    ) -> StoredModel:
        """Make the synced files in `staged` the content of `model`; `work` on the same disk takes what they replace."""
        sha256 = digest(directory, files)
        with self._changing():
            for path in self._manifest_paths():
                with suppress(StoreError):
                    if (manifest := self._read(path)).sha256 == sha256 and self._is_whole(manifest):
                        directory, files = manifest.directory, manifest.files
                        break
            else:
                final = self.content / sha256
                if os.path.lexists(final):
                    final.rename(work / "replaced")
                _sync(staged)
                staged.rename(final)
                _sync(self.content)
            manifest = Manifest(1, model, source, sha256, directory, files, datetime.now(UTC).replace(microsecond=0))
            self._write(manifest, work)
            self._drop_unreferenced()
        return self._stored(self._manifest_path(model))

    def remove(self, model: str) -> bool:
        """Forget `model`, and its bytes if no other model shares them. False if there is no such model."""
        path = self._manifest_path(model)
        if not os.path.lexists(path):
            return False
        self.create()
        with self._changing():
            path.unlink(missing_ok=True)
            _sync(self.manifests)
            self._drop_unreferenced()
        return True

    def lock_path(self, model: str) -> Path:
        """Hold this while pulling `model`: it makes `work_path` yours."""
        return self.partial / f"{names.key(model)}.lock"

    def work_path(self, model: str) -> Path:
        """A new place for a pull of `model`. Each has its own: a dead one's pip may still be writing to the last."""
        return self.partial / f"{names.key(model)}.{secrets.token_hex(4)}"

    def sweep(self, model: str) -> None:
        """Remove what dead pulls left behind. The caller holds the lock of `model`; what belongs to the lock of another
        living process is left alone."""
        own = names.key(model)
        for key in {path.name.partition(".")[0] for path in self.partial.iterdir()} - {own, "store"}:
            lock_path = self.partial / f"{key}.lock"
            descriptor = lock.try_acquire(lock_path)
            if descriptor is not None:
                try:
                    self._discard_work(key)
                finally:
                    lock.release(lock_path, descriptor)
        self._discard_work(own)
        with self._changing():
            self._drop_unreferenced()

    def _discard_work(self, key: str) -> None:
        for path in self.partial.glob(f"{glob.escape(key)}.*"):
            if path.suffix != ".lock":
                with suppress(OSError):  # somebody still writes there: the next pull's turn
                    discard(path)

    def _changing(self) -> AbstractContextManager[None]:
        return lock.held(self.partial / "store.lock")

    def _manifest_path(self, model: str) -> Path:
        return self.manifests / f"{names.key(model)}.json"

    def _manifest_paths(self) -> Iterator[Path]:
        if self.manifests.is_dir():
            yield from sorted(self.manifests.glob("*.json"))

    def _stored(self, path: Path) -> StoredModel:
        manifest = self._read(path)
        if not self._is_whole(manifest):
            raise StoreError(
                f"{manifest.model} in the model store is missing files or their lengths changed; "
                f"run: llm-os pull {manifest.model}"
            )
        place = self.content / manifest.sha256
        return StoredModel(
            name=manifest.model,
            source=manifest.source,
            bytes=sum(file.bytes for file in manifest.files),
            sha256=manifest.sha256,
            path=place if manifest.directory else place / manifest.files[0].name,
            pulled_at=manifest.pulled_at,
        )

    def _read(self, path: Path) -> Manifest:
        """A manifest in which every name and hash may be made part of a path."""
        try:
            manifest = msgspec.json.decode(_read_plain(path), type=Manifest)
        except (OSError, msgspec.DecodeError, RecursionError) as error:
            raise StoreError(
                f"manifest {path} cannot be read ({error}); remove the file or pull the model again"
            ) from error
        named = {names.file_name(file.name).casefold() for file in manifest.files}
        if (
            names.key(manifest.model) != path.stem
            or not (manifest.model + manifest.source).isprintable()
            or not named
            or len(named) != len(manifest.files)
            or (len(named) > 1 and not manifest.directory)
            or not all(names.is_sha256(text) for text in (manifest.sha256, *(file.sha256 for file in manifest.files)))
        ):
            raise StoreError(f"manifest {path} contradicts itself; remove the file or pull the model again")
        return manifest

    def _is_whole(self, manifest: Manifest) -> bool:
        place = self.content / manifest.sha256
        try:
            if self.content.is_symlink() or place.is_symlink():
                return False
            found = [(place / file.name).lstat() for file in manifest.files]
        except OSError:
            return False
        return all(
            stat.S_ISREG(status.st_mode) and status.st_size == file.bytes
            for status, file in zip(found, manifest.files, strict=True)
        )

    def _write(self, manifest: Manifest, work: Path) -> None:
        temporary = work / "manifest.json"
        with temporary.open("xb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._manifest_path(manifest.model))
        _sync(self.manifests)

    def _drop_unreferenced(self) -> None:
        """Remove content that no manifest names. One that cannot be understood (damaged, or of a later version) still
        counts for the hashes that it mentions; one that cannot be read at all counts for everything."""
        try:
            mentioned = [_read_plain(path) for path in self._manifest_paths()]
        except OSError:
            return
        for place in tuple(self.content.iterdir()):
            if not any(place.name.encode() in text for text in mentioned):
                discard(place)


def digest(directory: bool, files: tuple[StoredFile, ...]) -> str:
    """The hash of a model: its file's, or of what `sha256sum` prints for the files of a directory, sorted by name."""
    if not directory:
        return files[0].sha256
    ordered = sorted(files, key=lambda file: file.name)
    return hashlib.sha256("".join(f"{file.sha256}  {file.name}\n" for file in ordered).encode()).hexdigest()


def discard(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_plain(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a plain file")
    with os.fdopen(descriptor, "rb") as file:
        text = file.read(_LONGEST_MANIFEST + 1)
    if len(text) > _LONGEST_MANIFEST:
        raise OSError(f"longer than {_LONGEST_MANIFEST} bytes")
    return text


def _sync(directory: Path) -> None:
    """Make renames within `directory` survive a power cut, where the system lets directories be synced."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
