"""Fixtures for tests of every room. Real models come through the model store, so the tests meet what a user meets."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """A runner in the background may have been started with SIGINT ignored, and programs under test would inherit that:
    their Ctrl-C would do nothing. A handler of ours is reset to the default where a new program starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of smollm2:135m, pulled once into the user's store if it is not there."""
    if path := os.environ.get("LLM_OS_TEST_SMOLLM2"):
        return Path(path)
    from llm_os.drivers.store import Store

    return Store().pull("smollm2:135m")


@pytest.fixture
def tmpfs() -> Callable[[Path, str], AbstractContextManager[Path]]:
    """`with tmpfs(place, "size=64k"):` mounts a small file system at a new folder; skips the test where that is not
    allowed."""
    return _mounted


@contextlib.contextmanager
def _mounted(place: Path, options: str) -> Iterator[Path]:
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
        trouble = mounted.stderr.strip() if mounted.returncode else None
    except FileNotFoundError:
        trouble = "there is no mount command"
    if trouble is not None:
        pytest.skip(f"a tmpfs cannot be mounted here: {trouble}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # a test that failed has files open


@pytest.fixture
def in_a_process(request: pytest.FixtureRequest) -> Callable[..., str]:
    """`in_a_process(function, folder, 3)`: call a function of the test's file in a process with one thread. Returns
    what it returned, as text."""

    def call(function: Callable[..., object], folder: Path, *arguments: int) -> str:
        code = (
            "import importlib, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
            "test = importlib.import_module(sys.argv[2]); "
            "print(getattr(test, sys.argv[3])(Path(sys.argv[4]), *map(int, sys.argv[5:])))"
        )
        home = [str(request.path.parent), request.path.stem, function.__name__]
        command = [sys.executable, "-c", code, *home, str(folder), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call
