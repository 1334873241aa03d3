"""Kernels whose model is a function of the conversation, and one that obeys whatever it reads."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_os

PLUGIN = """
import llm_os
from llm_os.testing.scripted import Scripted, ScriptedImage

def script(conversation):
    raise AssertionError("the test gives one")

@llm_os.hookimpl
def register_drivers(register):
    info = llm_os.DeviceInfo(driver="scripted", device="a function", total_bytes=1 << 30, free_bytes=1 << 30)
    register("scripted", lambda config: Scripted(lambda text: script(text)), lambda: info)

@llm_os.hookimpl
def open_image(model, config):
    return ScriptedImage(name=model) if model.startswith("scripted:") else None
"""


def lay(folder: Path) -> None:
    """The plugin, as an installer would put it."""
    package = folder / "scripted_plugin"
    package.mkdir()
    (package / "__init__.py").write_text(PLUGIN)
    hooks = 'hooks = ["register_drivers", "open_image"]'
    (package / "llm_os.toml").write_text(
        f'[scripted_plugin]\nsummary = "for tests"\ncontract = {llm_os.CONTRACT}\n{hooks}\n'
    )
    info = folder / "scripted_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scripted_plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llm_os]\nscripted_plugin = scripted_plugin\n")
    importlib.invalidate_caches()


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., llm_os.Kernel]]:
    """`scripted(script, memory="8MiB")`: a kernel whose models, scripted:anything, answer `script(conversation)`."""
    folder = tmp_path / "site"
    folder.mkdir()
    lay(folder)
    monkeypatch.syspath_prepend(str(folder))
    kernels: list[llm_os.Kernel] = []

    def boot(script: Callable[[str], str], **config: Any) -> llm_os.Kernel:
        sys.modules.pop("scripted_plugin", None)
        vars(importlib.import_module("scripted_plugin"))["script"] = script
        settings = {"memory": "64MiB", "frame_size": "64KiB", **config}
        kernel = llm_os.Kernel(llm_os.Config(driver="scripted", plugins=("scripted_plugin",), **settings))
        kernels.append(kernel)
        return kernel

    yield boot
    for kernel in kernels:
        kernel.close()
    sys.modules.pop("scripted_plugin", None)
