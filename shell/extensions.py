"""Commands that enabled plugins add to `llm-os`. A plugin that fails is told and left out: the others are there."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import llm_os
from llm_os.shell import settings

Commands = dict[str, tuple[Callable[..., Any], str]]


def commands(known: Collection[str]) -> tuple[Commands, list[str]]:
    """name -> (function, help), and what went wrong, a line for each. `known` are the names that are taken.

    Only plugins in the settings file are asked, so that without any a command line costs nothing; only those whose
    manifest says `register_commands` are imported, each in a small house of its own.
    """
    found: Commands = {}
    problems: list[str] = []
    try:
        if not settings.plugins():
            return found, problems
        config = settings.config()
        enabled = llm_os.enabled_plugins(config)
        defaults = tuple(f"-{each.name}" for each in llm_os.enabled_plugins())
    except (llm_os.Error, OSError) as error:
        return found, [str(error)]
    for manifest in enabled:
        if "register_commands" not in manifest.hooks:
            continue
        alone = llm_os.Config(plugins=(*defaults, manifest.name), options=config.options)
        try:
            added = llm_os.commands(alone)
        except Exception as error:  # a plugin can fail in any way
            problems.append(str(error))
            continue
        for name, command in added.items():
            if name in known or name in found:
                problems.append(f"plugin {manifest.name!r} has a command {name!r}, which there is already; left out")
            else:
                found[name] = command
    return found, problems
