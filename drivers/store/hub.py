"""Models on a hub that speaks the Hugging Face protocol (HF_ENDPOINT, HF_TOKEN), through huggingface_hub's HTTP client.

The repository is listed once, and everything is fetched from the commit that the listing names and checked against the
hashes in it: SHA-256 for large files, git's blob hash for small ones. huggingface_hub's own download functions are not
used, because they neither bound the time to connect nor keep to one directory. Never fetches pickles or code.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import msgspec
from huggingface_hub import constants, get_session, get_token
from msgspec import Struct, field

from llm_os.drivers.store import names, transfer
from llm_os.drivers.store.transfer import StoredFile, Transfer
from llm_os.kernel.errors import StoreError

_TRIES = 5  # connections for one file; a dropped one is resumed where it broke off
_LONGEST_LISTING = 32 << 20
_LONGEST_INDEX = 64 << 20
_INDEX = "model.safetensors.index.json"
_DIRECTORY_FILE = re.compile(r"(config|generation_config|tokenizer[A-Za-z0-9_-]*)\.json|chat_template\.jinja", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?", re.ASCII)


class _Lfs(Struct):
    sha256: str
    size: int


class _File(Struct):
    name: str = field(name="rfilename")
    size: int | None = None
    blob: str | None = field(name="blobId", default=None)
    lfs: _Lfs | None = None

    @property
    def bytes(self) -> int:
        return self.lfs.size if self.lfs is not None else (self.size if self.size is not None else -1)


class _Listing(Struct):
    sha: str
    files: list[_File] = field(name="siblings")


class _Index(Struct):
    weight_map: dict[str, str]


def fetch(
    hub: names.Hub, staged: Path, pull: Transfer, connect_timeout_s: float, read_timeout_s: float
) -> tuple[bool, tuple[StoredFile, ...]]:
    """Put the file, or the safetensors directory, into `staged`. Returns whether it is a directory, and the files."""
    session = _Session(pull, connect_timeout_s, read_timeout_s)
    pull.report("resolving")
    listing = session.listing(hub.repo)
    tree = f"{hub.repo}/resolve/{listing.sha}"
    known = {file.name: file for file in listing.files}
    if hub.file is not None:
        if not hub.file.lower().endswith(".gguf"):
            raise StoreError(f"{pull.source}: only .gguf files are pulled alone; for safetensors leave the file out")
        if hub.file not in known:
            raise StoreError(
                f"{pull.source}: {hub.repo} has no file {names.shown(hub.file)}; check the name on the hub"
            )
        return False, session.download(tree, [known[hub.file]], staged)
    small = [file for file in listing.files if _DIRECTORY_FILE.fullmatch(file.name) or file.name == _INDEX]
    if "config.json" not in known:
        raise StoreError(
            f"{pull.source}: {hub.repo} has no config.json, so it is no safetensors model; name a .gguf file"
        )
    if (index := known.get(_INDEX)) is not None and index.bytes > _LONGEST_INDEX:
        raise StoreError(f"{pull.source}: {_INDEX} is longer than {_LONGEST_INDEX} bytes")
    got = session.download(tree, small, staged)
    shards = _shards(known, staged / _INDEX if index is not None else None, pull.source)
    return True, (*got, *session.download(tree, shards, staged))


def _shards(known: dict[str, _File], index: Path | None, source: str) -> list[_File]:
    """The files with the weights. The index decides: a repository may hold the same weights again in other files."""
    if index is not None:
        try:
            wanted = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
        except (msgspec.DecodeError, RecursionError) as error:
            raise StoreError(f"{source}: {_INDEX} cannot be read: {error}") from error
    else:
        wanted = {"model.safetensors"} & known.keys() or {name for name in known if name.endswith(".safetensors")}
    for name in sorted(wanted):
        if not names.file_name(name).endswith(".safetensors") or name not in known:
            raise StoreError(f"{source}: the weights {names.shown(name)} are not a safetensors file of the repository")
    if not wanted:
        raise StoreError(f"{source}: the repository has no .safetensors files; pickles (.bin, .pt) are never pulled")
    return [known[name] for name in sorted(wanted)]


class _Session:
    """Requests to one hub on behalf of one pull."""

    def __init__(self, pull: Transfer, connect_timeout_s: float, read_timeout_s: float) -> None:
        self._pull = pull
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._connect_s, self._read_s = connect_timeout_s, read_timeout_s
        # No connection outlives its request: the client is shared by the process and would keep it open.
        self._headers = {"User-Agent": "llm-os", "Accept-Encoding": "identity", "Connection": "close"}
        if token := get_token():
            self._headers["Authorization"] = f"Bearer {token}"  # not sent on to the host of a redirect

    def listing(self, repo: str) -> _Listing:
        self._resolve_in_time()
        text = bytearray()
        for chunk in self._get(f"api/models/{repo}/revision/main?blobs=true", start=0):
            self._pull.check_cancelled()
            text += chunk
            if len(text) > _LONGEST_LISTING:
                raise StoreError(f"{self._pull.source}: the hub's listing is longer than {_LONGEST_LISTING} bytes")
        try:
            listing = msgspec.json.decode(text, type=_Listing)
        except (msgspec.DecodeError, RecursionError) as error:
            raise StoreError(f"{self._pull.source}: {self._endpoint} answers like no model hub: {error}") from error
        if not _COMMIT.fullmatch(listing.sha):
            raise StoreError(f"{self._pull.source}: {self._endpoint} names no commit: {names.shown(listing.sha)}")
        return listing

    def download(self, tree: str, files: list[_File], staged: Path) -> tuple[StoredFile, ...]:
        """Fetch `files` into `staged` and check each against the listing."""
        for file in files:
            if file.bytes < 0:
                raise StoreError(f"{self._pull.source}: the hub does not say how long {names.shown(file.name)} is")
        done, total, got = 0, sum(file.bytes for file in files), []
        transfer.require_space(staged, total, self._pull.source)
        for file in files:
            path = staged / names.file_name(file.name.rpartition("/")[2])
            if os.path.lexists(path):
                raise StoreError(
                    f"{self._pull.source}: two files of the repository are called {names.shown(path.name)}"
                )
            chunks = self._body(f"{tree}/{quote(file.name)}", file)
            stored = self._pull.write(chunks, path, limit=file.bytes, phase="downloading", done=done, total=total)
            self._check(file, stored, path)
            done += stored.bytes
            got.append(stored)
        return tuple(got)

    def _body(self, place: str, file: _File) -> Iterator[bytes]:
        done = 0
        for attempt in range(1, _TRIES + 1):
            before = done
            try:
                for chunk in self._get(place, start=done):
                    done += len(chunk)
                    yield chunk
            except _Broken:
                if attempt == _TRIES or done == before:
                    raise
            if done >= file.bytes:
                return
            if done == before:
                break
        raise StoreError(f"{self._pull.source}: {names.shown(file.name)} ended after {done} of {file.bytes} bytes")

    def _get(self, place: str, *, start: int) -> Iterator[bytes]:
        """The body of a GET from byte `start`. Raises _Broken if the connection fails, StoreError for a refusal."""
        headers = self._headers | ({"Range": f"bytes={start}-"} if start else {})
        timeout = (self._connect_s, self._read_s, self._read_s, self._connect_s)
        # Versions of huggingface_hub differ in the HTTP library and so in its exceptions. Only the network is inside
        # this try: what the reader of this generator raises does not come through here.
        try:
            with get_session().stream("GET", f"{self._endpoint}/{place}", headers=headers, timeout=timeout) as response:
                self._check_status(response)
                skip = start if response.status_code == 200 else 0  # a server without ranges begins again
                for chunk in response.iter_bytes():  # as they come: a chunk being filled would be lost with the line
                    yield chunk[skip:]
                    skip = max(0, skip - len(chunk))
        except StoreError:
            raise
        except Exception as error:
            raise _Broken(f"{self._pull.source}: {self._endpoint}: {self._reason(error)}") from error

    def _check_status(self, response: Any) -> None:
        status, source = response.status_code, self._pull.source
        if status in (401, 403):
            raise StoreError(
                f"{source}: the hub refuses with {status}: the model is gated, private or does not exist; accept its "
                "terms on the hub and set HF_TOKEN"
            )
        if status == 404:
            raise StoreError(f"{source}: the hub has no such model or file (404); check the name")
        if status not in (200, 206):
            raise StoreError(f"{source}: {self._endpoint} answers with status {status}; try again later")

    def _check(self, file: _File, stored: StoredFile, path: Path) -> None:
        if file.lfs is not None:
            expected, found = file.lfs.sha256, stored.sha256
        else:
            git = hashlib.sha1(b"blob %d\0" % stored.bytes, usedforsecurity=False)
            with path.open("rb") as content:
                for chunk in transfer.read_chunks(content.read):
                    git.update(chunk)
            expected, found = file.blob or "", git.hexdigest()
        if not expected or found != expected:
            raise StoreError(
                f"{self._pull.source}: the hash of {names.shown(file.name)} is {found} where the hub promised "
                f"{expected or 'none'}; it was not stored"
            )

    def _resolve_in_time(self) -> None:
        """Look the hub's name up on another thread: the system's resolver alone may take tens of seconds to give up."""
        try:
            url = urlsplit(self._endpoint)
            scheme, host, port = url.scheme, url.hostname, url.port or 443
        except ValueError:
            scheme, host, port = "", None, 0
        if scheme not in ("http", "https") or host is None:
            raise StoreError(f"{self._pull.source}: HF_ENDPOINT is {self._endpoint}; write https://host")
        if scheme in getproxies() and not proxy_bypass(host):
            return
        failure: list[OSError] = []

        def look_up() -> None:
            try:
                socket.getaddrinfo(host, port)
            except OSError as error:
                failure.append(error)

        thread = threading.Thread(target=look_up, name="llm-os-resolver", daemon=True)
        thread.start()
        thread.join(self._connect_s)
        if failure or thread.is_alive():
            reason = self._reason(failure[0]) if failure else f"its name was not resolved within {self._connect_s:g} s"
            raise StoreError(f"{self._pull.source}: {self._endpoint}: {reason}")

    def _reason(self, error: Exception) -> str:
        kind = type(error).__name__
        if "ConnectTimeout" in kind:
            return f"no connection within {self._connect_s:g} s"
        if "Timeout" in kind:
            return f"no answer within {self._read_s:g} s"
        return " ".join(str(error).split()) or kind


class _Broken(StoreError):
    """The connection failed; trying once more may help."""
