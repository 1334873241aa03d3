"""Finds plugins and keeps what they registered, for one kernel. There is no global registry."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pluggy

from llm_os.kernel import hookspecs
from llm_os.kernel.config import Config
from llm_os.kernel.driver import DeviceInfo, Driver, DriverFactory, DriverProbe
from llm_os.kernel.errors import ConfigError, ModelNotFound
from llm_os.kernel.image import Image
from llm_os.kernel.journal import Log
from llm_os.kernel.swap import SwapStore

BUILT_IN = ("llm_os.drivers.formats.plugin", "llm_os.drivers.persistence.plugin", "llm_os.drivers.plugin")


class Plugins:
    """The plugins of one kernel. Raises ConfigError for a name in `config.plugins` that is not installed."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._manager = pluggy.PluginManager("llm_os")
        self._manager.add_hookspecs(hookspecs)
        for name in BUILT_IN:
            self._manager.register(importlib.import_module(name), name)
        installed = {point.name: point for point in entry_points(group="llm_os")}
        for name in config.plugins:
            if name not in installed:
                there = ", ".join(sorted(installed)) or "none"
                raise ConfigError(f"plugin {name!r} is not installed; installed third-party plugins: {there}")
            self._manager.register(_load(installed[name]), name)
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise ConfigError(f"a plugin implements a hook that does not exist: {error}") from None
        self._drivers: dict[str, tuple[DriverFactory, DriverProbe]] = {}
        self._manager.hook.register_drivers(register=self._register_driver)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self._manager.list_name_plugin()]

    def probe(self) -> list[DeviceInfo]:
        """Every registered driver's view of this machine."""
        return [_probe(name, probe) for name, (_, probe) in self._drivers.items()]

    def open_driver(self) -> Driver:
        """The driver that the configuration names. Raises ConfigError or DriverError."""
        name = self._config.driver
        if name == "auto":
            available = {info.driver for info in self.probe() if info.unavailable is None}
            name = "cuda" if "cuda" in available else "cpu"
        if name not in self._drivers:
            raise ConfigError(f"driver is {name!r}; registered are: auto, {', '.join(sorted(self._drivers))}")
        factory, _ = self._drivers[name]
        return factory(self._config)

    def open_image(self, model: str) -> Image:
        """Raises ModelNotFound when no plugin knows the name, and what the plugin raises otherwise."""
        image: Image | None = self._manager.hook.open_image(model=model, config=self._config)
        if image is None:
            raise ModelNotFound(f"no plugin knows a model named {model!r}; `llm-os models` lists what is here")
        return image

    def open_log(self, folder: Path) -> Log:
        """Raises StoreError, and ConfigError when no plugin keeps a journal."""
        log: Log | None = self._manager.hook.open_log(folder=folder)
        if log is None:
            raise ConfigError(f"state is {str(folder)!r}, but no plugin keeps a journal")
        return log

    def open_swap(self, config: Config) -> SwapStore:
        """Raises StoreError, and ConfigError when no plugin keeps swapped pages."""
        store: SwapStore | None = self._manager.hook.open_swap(config=config)
        if store is None:
            raise ConfigError("swap_host or swap_disk is set, but no plugin keeps swapped pages")
        return store

    def _register_driver(self, name: str, factory: DriverFactory, probe: DriverProbe) -> None:
        if name in self._drivers or name == "auto":
            raise ConfigError(f"two plugins register a driver named {name!r}; disable one of them")
        self._drivers[name] = (factory, probe)


def _load(point: EntryPoint) -> object:
    """Imports a plugin. Its failure is told as ours, with its name."""
    try:
        plugin: object = point.load()
    except Exception as error:
        raise ConfigError(f"plugin {point.name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return plugin


def _probe(name: str, probe: DriverProbe) -> DeviceInfo:
    try:
        return probe()
    except Exception as error:  # it promised not to; the other drivers still count
        why = f"its probe failed: {type(error).__name__}: {error}"
        return DeviceInfo(driver=name, device="", total_bytes=0, free_bytes=0, unavailable=why)
