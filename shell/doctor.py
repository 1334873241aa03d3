"""`llm-os doctor`: what was found on this machine, what is wrong with it, and the way out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json as json_text
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import llm_os
from llm_os.shell import settings, signals
from llm_os.shell.options import FLAG
from llm_os.shell.progress import Waiting
from llm_os.shell.stdio import printable

T = TypeVar("T")
_ROOM = 2 << 30  # a small model and its download


def doctor(*, json: Annotated[bool, FLAG] = False) -> int:
    """Show what was found: Python, torch, devices, the model store, plugins, and what is wrong.

    Exit code 1 if something is wrong.

    Parameters
    ----------
    json
        Print one JSON object.
    """
    with Waiting("looking around"), signals.abrupt():
        report = examine()
    if json:
        print(json_text.dumps(report))
    else:
        for line in _text(report):
            print(printable(line))
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows. Whatever fails on the way becomes one of `problems`."""
    problems: list[str] = []
    config = next(iter(_try(lambda: [settings.config()], "the settings cannot be used", problems)), llm_os.Config())
    probes = _try(lambda: llm_os.probe(config), "the drivers cannot be asked", problems)
    drivers = [_driver(info) for info in probes or _try(llm_os.probe, "the drivers cannot be asked", problems)]
    for driver in drivers:
        if driver["driver"] == "cpu" and driver["unavailable"]:
            problems.append(f"the cpu driver cannot be used: {driver['unavailable']}")
    report = {
        "llm_os": llm_os.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": _version("torch"),
        "drivers": drivers,
        "store": _store(problems),
        "plugins": [
            each.name for each in _try(lambda: llm_os.enabled_plugins(config), "the plugins cannot be loaded", problems)
        ],
        "problems": problems,
    }
    _misfits(drivers, problems)
    return report


def _driver(info: llm_os.DeviceInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__struct_fields__}


def _misfits(drivers: list[dict[str, Any]], problems: list[str]) -> None:
    """Packages that break torch's CPU build or waste a gigabyte beside it."""
    if importlib.util.find_spec("torchvision"):
        problems.append(
            "torchvision is installed and may not match torch; llm-os does not use it: pip uninstall torchvision"
        )
    on_cuda = any(driver["driver"] == "cuda" and driver["unavailable"] is None for driver in drivers)
    if importlib.util.find_spec("triton") and not on_cuda:
        problems.append("triton is installed: 1 GB that llm-os does not use on this machine: pip uninstall triton")


def _store(problems: list[str]) -> dict[str, Any]:
    store = llm_os.Store()
    stored = _try(store.list, "the model store cannot be read", problems)
    problems += _try(store.problems, "the model store cannot be read", problems)
    there = next(path for path in (store.path, *store.path.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problems.append(f"the model store {store.path} cannot be written; set LLM_OS_HOME to a directory that can")
    elif free < _ROOM:
        problems.append(
            f"{_size(free)} are free for the model store; free some space or set LLM_OS_HOME to another disk"
        )
    return {
        "path": str(store.path),
        "models": len(stored),
        "bytes": sum(each.bytes for each in stored),
        "free_bytes": free,
    }


def _try(look: Callable[[], Iterable[T]], what: str, problems: list[str]) -> list[T]:
    try:
        return list(look())
    except Exception as error:  # a broken plugin or installation can fail in any way, and that is what is looked for
        message = str(error) if isinstance(error, llm_os.Error) else f"{type(error).__name__}: {error}"
        if f"{what}: {message}" not in problems:
            problems.append(f"{what}: {message}")
        return []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(report: dict[str, Any]) -> list[str]:
    store = report["store"]
    models = f"{store['models']} model{'' if store['models'] == 1 else 's'}, {_size(store['bytes'])}"
    lines = [
        f"llm-os   {report['llm_os']}",
        f"python   {report['python']}, {report['system']}",
        f"torch    {report['torch'] or 'not installed'}",
        f"store    {_home(store['path'])}",
        f"         {models}; {_size(store['free_bytes'])} free",
        f"plugins  {', '.join(report['plugins']) or 'none'}",
    ]
    for driver in report["drivers"]:
        if driver["unavailable"] is not None:
            lines.append(f"{driver['driver']:<8} not here: {driver['unavailable']}")
            continue
        lines.append(f"{driver['driver']:<8} {driver['device']}")
        memory = f"{_size(driver['free_bytes'])} of {_size(driver['total_bytes'])} free"
        lines.append(f"         {'; '.join(filter(None, (memory, ' '.join(driver['features']))))}")
        if details := ", ".join(f"{name} {value}" for name, value in driver["details"].items()):
            lines.append(f"         {details}")
    lines.append("")
    return (
        [*lines, *(f"problem: {problem}" for problem in report["problems"])]
        if report["problems"]
        else [*lines, "All is well."]
    )


def _home(path: str) -> str:
    try:
        return f"~/{Path(path).relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return path


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
