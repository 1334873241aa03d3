"""Fixtures that need real models. They come through the model store, so the tests meet what a user meets."""

from __future__ import annotations

import os
import signal
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
