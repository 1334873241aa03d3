"""Commands that enabled plugins add to `llm-os`. A plugin that fails is told and left out: the others are there."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import llm_os
from llm_os.shell import settings

Commands = dict[str, tuple[Callable[..., Any], str]]


def off(command: str) -> str | None:
    """The plugin, installed and not enabled, that may bring this command: one of the same name."""
    named = (each for each in llm_os.installed_plugins() if each.name == command)
    return next((each.name for each in named if each.problem is None and "register_commands" in each.hooks), None)


def commands(known: Collection[str]) -> tuple[Commands, list[str]]:
    """name -> (function, help), and what went wrong, a line for each. `known` are the names that are taken.

    Only plugins in the settings file are asked, so that without any a command line costs nothing; only those whose
    manifest says `register_commands` are imported, each for itself.
    """
    found: Commands = {}
    problems: list[str] = []
    try:
        if not settings.plugins():
            return found, problems
        config = settings.config()
        enabled = llm_os.enabled_plugins(config)
    except (llm_os.Error, OSError) as error:
        return found, [str(error)]
    for manifest in enabled:
        if "register_commands" not in manifest.hooks:
            continue
        try:
            added = llm_os.commands(config, manifest.name)
        except Exception as error:  # a plugin can fail in any way
            problems.append(str(error))
            continue
        for name, command in added.items():
            if name in known or name in found:
                problems.append(f"plugin {manifest.name!r} has a command {name!r}, which there is already; left out")
            else:
                found[name] = command
    return found, problems
