"""The facade's own functions: short ways through the kernel for a script or a notebook."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

from llm_os.kernel.config import Config
from llm_os.kernel.driver import DeviceInfo
from llm_os.kernel.image import Image
from llm_os.kernel.kernel import Kernel
from llm_os.kernel.manifest import Manifest, choose, installed
from llm_os.kernel.plugins import Plugins
from llm_os.kernel.request import Request, Sampling


def generate(model: str, prompt: str, *, config: Config | None = None, **sampling: Any) -> str:
    """One answer to one chat message, blocking: boots a kernel, loads the model, answers, gives everything back.

    Keyword arguments are fields of Sampling. Raises what Kernel and its streams raise.
    """
    request = Request(model=model, messages=[{"role": "user", "content": prompt}], sampling=Sampling(**sampling))
    with Kernel(config) as kernel:
        return kernel.stream(request).result().text


def probe(config: Config | None = None) -> list[DeviceInfo]:
    """What every registered driver finds on this machine."""
    with closing(Plugins(config or Config())) as plugins:
        return plugins.probe()


def commands(config: Config | None = None, plugin: str | None = None) -> dict[str, tuple[Callable[..., Any], str]]:
    """The commands that plugins add to `llm-os`: name -> (function, help); those of one `plugin`, if it is named, and
    then no other is imported."""
    config = config or Config()
    alone = config
    if plugin is not None:
        others = tuple(f"-{each.name}" for each in choose(()) if each.name != plugin)
        alone = Config(plugins=(*others, plugin), options={plugin: config.options.get(plugin, {})})
    with closing(Plugins(alone)) as plugins:
        return plugins.commands(config)


def enabled_plugins(config: Config | None = None) -> list[Manifest]:
    """The plugins that a kernel with this configuration would load, without loading them. Raises ConfigError."""
    return choose((config or Config()).plugins)


def installed_plugins() -> list[Manifest]:
    """Every plugin that is installed here, enabled or not. Imports none of them."""
    return list(installed().values())


def open_image(model: str, config: Config | None = None) -> Image:
    """The model's description and tokenizer as a kernel with this configuration would see them; close it after use.

    Loads no weights and never downloads. Raises ModelNotFound, FormatError or Unsupported.
    """
    with closing(Plugins(config or Config())) as plugins:
        return plugins.open_image(model)
