"""A store in a temporary directory, wheels for a real pip to find, and a loopback server that speaks like a hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from llm_os.drivers.store import Store

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LLM_OS_HOME of this test: no test sees or touches the user's store."""
    home = tmp_path / "home"
    monkeypatch.setenv("LLM_OS_HOME", str(home))
    return home


@pytest.fixture
def store(home: Path) -> Store:
    return Store(connect_timeout_s=5, read_timeout_s=5)


@pytest.fixture
def leftovers(home: Path) -> Callable[[], list[str]]:
    """Every file below the store that is not a finished model's, and every partial directory."""

    def find() -> list[str]:
        models = home / "models"
        expected = {model.sha256 for model in Store().list()}
        left = [str(path) for path in models.glob("partial/*")]
        left += [str(path) for path in models.glob("content/*") if path.name not in expected]
        return left + [str(path) for path in models.glob("*") if path.name not in ("content", "manifests", "partial")]

    return find


@pytest.fixture
def add_alias(home: Path) -> Callable[..., None]:
    def add(name: str, *sources: dict[str, Any]) -> None:
        path = home / "aliases.json"
        home.mkdir(exist_ok=True)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {name: {"sources": sources}}))

    return add


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a wheel of the given members where pip, told to use nothing else, finds it."""
    place = tmp_path / "wheels"
    place.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip-cache"))

    def write(members: dict[str | zipfile.ZipInfo, bytes], dist: str = "tiny_model", version: str = "1.0") -> Path:
        path = place / f"{dist}-{version}-py3-none-any.whl"
        info = f"{dist}-{version}.dist-info"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return path

    return write


class HubServer:
    """Repositories of files, and how the server misbehaves. `requests` has every path asked for, with its Range."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.status: int | None = None  # answer everything with this
        self.drop_after: int | None = None  # close the connection after so many bytes of a file
        self.drops_left = 1_000_000
        self.ranges = True
        self.body_of: dict[str, bytes] = {}  # file name -> sent in place of what the listing promises
        self.listing: Callable[[dict[str, Any]], Any] = lambda listing: listing
        self.pause_after: int | None = None  # send so much of a file, then wait for `go_on`
        self.go_on = threading.Event()
        self.silent = False  # accept the connection and say nothing
        self.tokens: set[str | None] = set()

    def describe(self, repo: str) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for name, content in self.repos[repo].items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if not name.endswith((".json", ".jinja", ".py")):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": repo, "sha": COMMIT, "siblings": siblings}

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.requests.append((handler.path, wanted))
        self.tokens.add(handler.headers.get("Authorization"))
        if self.silent:
            self.go_on.wait(30)
            return None
        if self.status is not None:
            return self.reply(handler, self.status, b"")
        path = unquote(handler.path.partition("?")[0]).strip("/")
        if path.startswith("api/models/") and path.endswith("/revision/main"):
            repo = path.removeprefix("api/models/").removesuffix("/revision/main")
            if repo not in self.repos:
                return self.reply(handler, 404, b"{}")
            return self.reply(handler, 200, json.dumps(self.listing(self.describe(repo))).encode())
        repo, _, name = path.partition(f"/resolve/{COMMIT}/")
        if name not in self.repos.get(repo, {}):
            return self.reply(handler, 404, b"")
        body = self.body_of.get(name, self.repos[repo][name])
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        return self.reply(handler, 206 if start else 200, body[start:], file=True)

    def reply(self, handler: BaseHTTPRequestHandler, status: int, body: bytes, *, file: bool = False) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if file and self.drop_after is not None and len(body) > self.drop_after and self.drops_left > 0:
            self.drops_left -= 1
            handler.wfile.write(body[: self.drop_after])
            return
        if file and self.pause_after is not None:
            handler.wfile.write(body[: self.pause_after])
            handler.wfile.flush()
            self.go_on.wait(30)
            body = body[self.pause_after :]
        handler.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import close_session

    served = HubServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                served.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN_PATH", os.devnull)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    close_session()
    try:
        yield served
    finally:
        served.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
        close_session()


_PULL = """
import sys
from llm_os.drivers.store import Store
def say(progress):
    print(progress.phase, progress.done_bytes, progress.note, flush=True)
print(Store().pull(sys.argv[1], progress=say), flush=True)
"""


class Puller:
    """`Store().pull(model)` in a process of its own, which prints its progress and then the path."""

    def __init__(self, model: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PULL, model], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, meant: Callable[[str], bool]) -> str:
        """The next line of progress for which `meant` holds."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if meant(line):
                return line
        raise AssertionError(f"ended without it: {self.process.communicate()[1]}")

    def wait_for_bytes(self) -> None:
        self.wait_for(lambda line: line.startswith("downloading") and int(line.split()[1]) > 0)

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        """Exit code, rest of stdout, stderr; after the signal `number` if given."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def puller() -> Iterator[Callable[[str], Puller]]:
    started: list[Puller] = []

    def start(model: str) -> Puller:
        started.append(Puller(model))
        return started[-1]

    yield start
    for puller in started:
        if puller.process.poll() is None:
            puller.end(signal.SIGKILL)
