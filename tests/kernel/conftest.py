"""The core on the sim driver, with time and completions in the test's hands; plugins as an installer puts them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

import llm_os
from llm_os.testing import Machine


@pytest.fixture
def machine() -> type[Machine]:
    return Machine


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a distribution with one plugin, a package with its manifest, on the path, as an installer would."""

    def install(name: str, source: str, *hooks: str, manifest: str | None = None) -> None:
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text(source)
        table = f'[{name}]\nsummary = "for a test"\ncontract = {llm_os.CONTRACT}\nhooks = {list(hooks)}\n'
        (package / "llm_os.toml").write_text(table if manifest is None else manifest)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[llm_os]\n{name} = {name}\n")
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    return install
