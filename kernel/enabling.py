"""How a plugin comes in: imported, held to its manifest and to the hooks, and warned of what the next version drops."""

from __future__ import annotations

import importlib
import logging
from functools import partial

import pluggy

from llm_os.kernel import hookspecs
from llm_os.kernel.errors import ConfigError
from llm_os.kernel.isolation import told, within
from llm_os.kernel.manifest import Manifest

_log = logging.getLogger("llm_os.plugins")


def enable(manager: pluggy.PluginManager, manifest: Manifest, limit_s: float) -> None:
    """Import a plugin, in at most so many seconds, and register it. Raises ConfigError."""
    name = manifest.name
    try:
        plugin = within(limit_s, partial(_load, manifest.module))
    except Exception as error:
        way = f"repair it, or llm-os plugins disable {name}"
        raise ConfigError(f"plugin {name!r} cannot be imported: {told(error)}; {way}") from error
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except ValueError as error:
        raise ConfigError(f"plugin {name!r} is {manifest.module}, as another plugin is") from error
    except pluggy.PluginValidationError as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"plugin {name!r} does not fit the hooks of docs/hooks.md: {what}") from None
    callers = manager.get_hookcallers(plugin) or []
    if undeclared := sorted({caller.name for caller in callers} - set(manifest.hooks)):
        raise ConfigError(f"plugin {name!r} implements {', '.join(undeclared)}, but its manifest does not")
    forms = []
    for caller in callers:
        own, *more = (each for each in caller.get_hookimpls() if each.plugin is plugin)
        if more or own.wrapper or own.hookwrapper:
            raise ConfigError(f"plugin {name!r} implements {caller.name} twice, or around others; once and plainly")
        forms += [caller.name, *(f"{caller.name}.{argument}" for argument in own.argnames)]
    _warn(manifest, forms)


def _load(module: str) -> object:
    """A module, or what "module:name" says in it. A class is made an object: one for each kernel."""
    name, _, attribute = module.partition(":")
    plugin: object = importlib.import_module(name)
    for part in filter(None, attribute.split(".")):
        plugin = getattr(plugin, part)
    return plugin() if isinstance(plugin, type) else plugin


def _warn(manifest: Manifest, forms: list[str]) -> None:
    """Of what works in this version of the contract for the last time. `forms` are hooks, and their arguments as
    "hook.argument"."""
    name, now = manifest.name, hookspecs.CONTRACT
    if manifest.contract < now:
        _log.warning("plugin %r is for contract %d, and %d is the last to take it", name, manifest.contract, now)
    for form in forms:
        if (instead := hookspecs.DEPRECATED.get(form)) is not None:
            _log.warning("plugin %r uses %s, which contract %d takes for the last time; %s", name, form, now, instead)
