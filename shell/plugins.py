"""`llm-os plugins`: what is installed, what is enabled, and a package to begin with. Imports no plugin.

A plugin that is broken can be disabled here, however it is broken.
"""

from __future__ import annotations

import difflib
import json as json_text
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

import llm_os
from llm_os.shell import scaffold, settings
from llm_os.shell.options import FLAG
from llm_os.shell.stdio import one_line, say

_NO_SANDBOX = (
    "A plugin is Python code that runs in the kernel's process and can do whatever you can do. It is in no sandbox, "
    "and what it says that it uses is not enforced. Enable only what you would run as a program."
)


def list_plugins(*, json: Annotated[bool, FLAG] = False) -> None:
    """List the plugins that are installed, and which are enabled. Runs none of their code.

    Parameters
    ----------
    json
        Print one JSON object.
    """
    there, on = llm_os.installed_plugins(), _enabled()
    rows = [_report(each, each.name in on) for each in there]
    missing = [name for name in on if name not in {each.name for each in there}]
    if json:
        print(json_text.dumps({"plugins": rows, "missing": missing, "settings": str(settings.path())}))
        return
    lines = [("NAME", "VERSION", "STATE", "SUMMARY")]
    for row in rows:
        state = "broken" if row["problem"] else "on" if row["enabled"] else "off"
        lines.append((row["name"], "built in" if row["built_in"] else row["version"], state, row["summary"]))
    lines += [(name, "", "missing", "enabled, but not installed") for name in missing]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        cells = [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]
        print(one_line("  ".join(cells)).rstrip())
    for row in rows:
        if row["problem"]:
            say(f"llm-os: plugin {row['name']!r}: {row['problem']}")
    for name in settings.read().get("options", {}):
        if name not in {each.name for each in there}:
            say(f"llm-os: {settings.path()} has options for a plugin {name!r}, which is not installed")


def info(name: str, /, *, json: Annotated[bool, FLAG] = False) -> None:
    """Show what a plugin says of itself. Runs none of its code.

    Parameters
    ----------
    name
        As llm-os plugins list shows it.
    json
        Print one JSON object.
    """
    report = _report(_find(name), name in _enabled())
    if json:
        print(json_text.dumps(report))
        return
    for line in _described(report):
        print(one_line(line))
    print(f"enabled       {'yes' if report['enabled'] else 'no'}")
    if report["problem"]:
        print(one_line(f"problem       {report['problem']}"))


def enable(name: str, /, *, yes: Annotated[bool, Parameter(alias="-y"), FLAG] = False) -> int:
    """Let every kernel that this command boots load a plugin. Asks first.

    Parameters
    ----------
    name
        As llm-os plugins list shows it.
    yes
        Do not ask.
    """
    manifest = _find(name)
    listed = settings.plugins()
    if name in _enabled():
        say(f"plugin {name!r} is enabled already")
        return 0
    if manifest.problem is not None:
        raise llm_os.ConfigError(f"plugin {name!r} cannot be enabled: {manifest.problem}")
    if not yes:
        _ask(manifest)
    kept = tuple(each for each in listed if each != f"-{name}")
    default = name in {each.name for each in llm_os.enabled_plugins()}
    settings.write_plugins(kept if default else (*kept, name))
    say(f"plugin {name!r} is enabled, in {settings.path()}")
    return 0


def disable(name: str, /) -> int:
    """Load a plugin no more. Works for one that is broken, or not installed any more.

    Parameters
    ----------
    name
        As llm-os plugins list shows it.
    """
    listed = settings.plugins()
    if name not in _enabled():
        if name not in listed:
            _find(name)  # raises if there is none
        say(f"plugin {name!r} is not enabled")
        return 0
    kept = tuple(each for each in listed if each != name)
    if name in {each.name for each in llm_os.enabled_plugins()}:
        kept = (*kept, f"-{name}")
    settings.write_plugins(kept)
    say(f"plugin {name!r} is disabled, in {settings.path()}")
    return 0


def new(name: str, /, *, into: Path = Path()) -> None:
    """Write a plugin to begin with: a package that installs, and whose tests pass. Prints its folder.

    Parameters
    ----------
    name
        The distribution's name, such as my-plugin; the plugin's is the same with underscores.
    into
        The folder to put the package's folder in.
    """
    taken = {manifest.name for manifest in llm_os.installed_plugins()}
    folder = scaffold.write(name, into, taken)
    plugin = scaffold.module_of(name)
    say(f"next: pip install pytest hypothesis -e {folder}, pytest {folder}, llm-os plugins enable {plugin}")
    print(folder)


def _enabled() -> dict[str, None]:
    """Names, in order; of plugins that are not installed, too."""
    names = dict.fromkeys(manifest.name for manifest in llm_os.enabled_plugins())
    for name in settings.plugins():
        if name.startswith("-"):
            names.pop(name[1:], None)
        else:
            names[name] = None
    return names


def _find(name: str) -> llm_os.Manifest:
    there: dict[str, llm_os.Manifest] = {}
    for manifest in llm_os.installed_plugins():
        there.setdefault(manifest.name, manifest)
    if name not in there:
        near = difflib.get_close_matches(name, there, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "llm-os plugins list shows those that are"
        raise llm_os.ConfigError(f"plugin {name!r} is not installed; {hint}")
    return there[name]


def _report(manifest: llm_os.Manifest, enabled: bool) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "version": manifest.version or llm_os.__version__,
        "distribution": manifest.distribution or "llm-os-runtime",
        "module": manifest.module,
        "summary": manifest.summary,
        "contract": manifest.contract,
        "hooks": list(manifest.hooks),
        "capabilities": list(manifest.capabilities),
        "built_in": manifest.built_in,
        "enabled": enabled,
        "problem": manifest.problem,
    }


def _described(report: dict[str, Any]) -> list[str]:
    return [
        f"name          {report['name']}",
        f"version       {report['version']}",
        f"distribution  {report['distribution']}",
        f"module        {report['module']}",
        f"summary       {report['summary']}",
        f"contract      {report['contract']}, of this llm-os {llm_os.CONTRACT}",
        f"hooks         {', '.join(report['hooks']) or 'none'}",
        f"capabilities  {', '.join(report['capabilities']) or 'none'}",
    ]


def _ask(manifest: llm_os.Manifest) -> None:
    """Raises ConfigError unless somebody says yes."""
    for line in _described(_report(manifest, False)):
        say(line)
    say(_NO_SANDBOX)
    if sys.stdin is None or not sys.stdin.isatty():
        raise llm_os.ConfigError(f"nobody can be asked whether to enable {manifest.name!r}; add --yes if you want it")
    sys.stderr.write("Enable it? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise llm_os.ConfigError(f"plugin {manifest.name!r} stays as it is: not enabled")
