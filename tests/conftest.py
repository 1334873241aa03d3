"""Fixtures that need real models. They come through the model store, so the tests meet what a user meets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of smollm2:135m, pulled once into the user's store if it is not there."""
    if path := os.environ.get("LLM_OS_TEST_SMOLLM2"):
        return Path(path)
    from llm_os.drivers.store import Store

    return Store().pull("smollm2:135m")
