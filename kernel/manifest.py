"""What a plugin says of itself, in a file that is read without importing its code: `llm_os.toml` in its package.

    [shout]                               the plugin's name, as in its entry point
    summary = "answers in capitals"
    contract = 1                          the version of `kernel/hookspecs.py` that it was written for
    hooks = ["register_filters"]          those that it implements
    capabilities = []                     what it asks for: "files", "network", "subprocess", "secrets", "routes"

Capabilities are told to whoever enables the plugin; Python cannot hold a plugin to them.
"""

from __future__ import annotations

import difflib
import tomllib
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from llm_os.kernel.errors import ConfigError

FILE = "llm_os.toml"
GROUP = "llm_os"
_LARGEST = 65536  # bytes of the file
Capability = Literal["files", "network", "subprocess", "secrets", "routes"]

BUILT_IN = {  # name -> module, or "module:Class"; those that are on unless Config.plugins has "-NAME"
    "formats": "llm_os.drivers.formats.plugin",
    "persistence": "llm_os.drivers.persistence.plugin",
    "drivers": "llm_os.drivers.plugin",
    "policies": "llm_os.plugins.policies",
    "grammar": "llm_os.plugins.grammar.plugin:GrammarPlugin",
    "prompt_lookup": "llm_os.plugins.prompt_lookup",
}
OPTIONAL = {  # built-ins that have to be enabled, as a stranger's
    "mcp": "llm_os.plugins.mcp:Mcp",
    "quantize": "llm_os.plugins.quantize",
    "redact": "llm_os.plugins.redact",
    "tools": "llm_os.plugins.tools",
}


class Manifest(Struct, frozen=True, kw_only=True):
    """One plugin that is installed."""

    name: str
    version: str  # of its distribution
    distribution: str
    module: str  # what is imported when it is enabled; "module:Class" is made an object, one for each kernel
    summary: str = ""
    contract: int = 0
    hooks: tuple[str, ...] = ()
    capabilities: tuple[Capability, ...] = ()
    built_in: bool = False
    problem: str | None = None  # why it cannot be enabled


def installed() -> dict[str, Manifest]:
    """Every plugin here, by name, built-ins first. Imports none of them."""
    found = {}
    for name, module in (BUILT_IN | OPTIONAL).items():
        found[name] = _describe(Manifest(name=name, version="", distribution="", module=module, built_in=True))
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        distribution, version = ("", "") if point.dist is None else (point.dist.name or "", point.dist.version or "")
        manifest = Manifest(name=point.name, version=version, distribution=distribution, module=point.value)
        name = point.name
        if (other := found.get(name)) is None:
            found[name] = _describe(manifest)
            continue
        both = f"{other.distribution or 'llm-os'} and {distribution}"
        problem = f"{both} have a plugin named {name!r}; uninstall one"
        if not other.built_in:  # neither is chosen by chance
            found[name] = msgspec.structs.replace(other, problem=problem)
        found[f"{name} ({distribution})"] = msgspec.structs.replace(manifest, problem=problem)
    return found


def choose(names: tuple[str, ...]) -> list[Manifest]:
    """The manifests of the plugins that `Config.plugins` enables, in order. Raises ConfigError."""
    there = installed()
    chosen = dict.fromkeys(BUILT_IN)
    for name in names:
        known = name.removeprefix("-")
        if known not in there:
            near = difflib.get_close_matches(known, there, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"installed are: {', '.join(there)}"
            raise ConfigError(f"plugin {known!r} is not installed; {hint}")
        if name.startswith("-"):
            chosen.pop(known, None)
        else:
            chosen[name] = None
    for name in chosen:
        if (problem := there[name].problem) is not None:
            raise ConfigError(f"plugin {name!r} cannot be enabled: {problem}")
    return [there[name] for name in chosen]


def _describe(manifest: Manifest) -> Manifest:
    """With what its file says."""
    from llm_os.kernel.hookspecs import CONTRACT, HOOKS

    try:
        fields = _read(manifest.name, manifest.module)
    except Exception as error:  # whatever is in a file of a plugin that nobody has enabled
        what = " ".join(f"{error}".split())[:300] or type(error).__name__
        return msgspec.structs.replace(manifest, problem=f"its {FILE}: {what}")
    manifest = msgspec.structs.replace(manifest, **fields)
    problem = None
    if unknown := sorted(set(manifest.hooks) - HOOKS):
        problem = f"its {FILE} names hooks that do not exist: {', '.join(unknown)}; see docs/hooks.md"
    if not max(1, CONTRACT - 1) <= manifest.contract <= CONTRACT:  # the form before works for one more version
        problem = f"it is for contract {manifest.contract}, this llm-os has {CONTRACT}; install another version of it"
    return msgspec.structs.replace(manifest, problem=problem)


class _Table(Struct, forbid_unknown_fields=True):
    """One table of the file."""

    summary: str
    contract: int
    hooks: tuple[str, ...]
    capabilities: tuple[Capability, ...] = ()


def _read(name: str, module: str) -> dict[str, Any]:
    """The plugin's table. Raises OSError, ValueError, ImportError, and RecursionError where a file is made for it."""
    package = module.partition(":")[0].partition(".")[0]
    spec = find_spec(package)  # a top-level package is found without being imported
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise ValueError(f"{package} is no package that could hold it; see docs/write-a-plugin.md")
    path = Path(folders[0], FILE)
    if not path.is_file():
        raise ValueError(f"{package} has none; see docs/write-a-plugin.md")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST} bytes")
    table = tomllib.loads(path.read_text("utf-8")).get(name)
    if table is None:
        raise ValueError(f"it has no table [{name}]")
    return msgspec.structs.asdict(msgspec.convert(table, _Table))
