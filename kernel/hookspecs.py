"""The doors of the kernel: what a plugin may implement. Entry-point group `llm_os`.

A plugin is a module (or object) with functions named as below and marked with `llm_os.hookimpl`. Built-ins are loaded
by name in the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pluggy

from llm_os.kernel.config import Config
from llm_os.kernel.driver import DriverFactory, DriverProbe
from llm_os.kernel.image import Image
from llm_os.kernel.journal import Log
from llm_os.kernel.swap import SwapStore

hookspec = pluggy.HookspecMarker("llm_os")
hookimpl = pluggy.HookimplMarker("llm_os")


class RegisterDriver(Protocol):
    def __call__(self, name: str, factory: DriverFactory, probe: DriverProbe) -> None: ...


@hookspec
def register_drivers(register: RegisterDriver) -> None:
    """Offer devices: call `register(name, factory, probe)` for each.

    Called once per kernel, at boot, from the thread that builds it. `factory` is called only if the driver is chosen,
    `probe` by `llm-os doctor` and by the choice of "auto". Neither may be slow to import: import inside.
    """


@hookspec(firstresult=True)
def open_log(folder: Path) -> Log | None:
    """Open the journal of a state directory, with the sessions that had not ended.

    Called once per kernel that has `Config.state`, at boot, from the thread that builds it. Raises StoreError. The
    first result wins; third-party plugins are asked before built-ins.
    """


@hookspec(firstresult=True)
def open_swap(config: Config) -> SwapStore | None:
    """Open the place for KV that leaves the device.

    Called once per kernel that has `Config.swap_host` or `swap_disk`, at boot, from the thread that builds it. Raises
    StoreError. The first result wins; third-party plugins are asked before built-ins.
    """


@hookspec(firstresult=True)
def open_image(model: str, config: Config) -> Image | None:
    """Open the model of that name, or None if the name is not for this plugin.

    Called once per model and load, from a worker thread, so it may read files. Raises ModelNotFound, FormatError or
    Unsupported. The first result wins; third-party plugins are asked before built-ins.
    """
