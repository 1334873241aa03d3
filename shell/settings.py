"""The user's settings file, `~/.config/llm-os/config.toml`: which plugins are enabled, and what they are told.

    plugins = ["shout", "-persistence"]     enabled besides the built-ins; "-NAME" is off
    policy = "fifo"                         who is served first, where a plugin offers it

    [options.shout]                         Config.options, by plugin
    volume = 11

The one place where the shell makes a Config. Imports no plugin.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import llm_os

_FIELDS = ("plugins", "policy", "options")
_LARGEST = 1 << 20
_LIST = re.compile(r"^[ \t]*plugins[ \t]*=[ \t]*\[[^\]]*\][ \t]*", re.MULTILINE)


def path() -> Path:
    """Where the file is, or would be. XDG_CONFIG_HOME is honoured if it is absolute, as its specification says."""
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".config") / "llm-os" / "config.toml"


def config(**options: Any) -> llm_os.Config:
    """What the file says, and `options` of the command line. What plugins are told that are not enabled now is kept for
    the day when they are. Raises ConfigError, OSError."""
    settings = read()
    if settings.get("plugins"):
        check(settings["plugins"])
    if told := settings.get("options"):
        enabled = {each.name for each in llm_os.enabled_plugins(llm_os.Config(plugins=settings.get("plugins", ())))}
        settings["options"] = {name: told[name] for name in told if name in enabled}
    return llm_os.Config(**{**settings, **options})


def read() -> dict[str, Any]:
    """The file's fields; none if there is no file. Raises ConfigError, OSError."""
    text = _text()
    return _parse(text) if text else {}  # without a file, no command waits for what checks one


def plugins() -> tuple[str, ...]:
    """What `Config.plugins` is here. Raises ConfigError, OSError."""
    return tuple(read().get("plugins", ()))


def check(names: list[str]) -> None:
    """Raises ConfigError for an enabled plugin that cannot be, with the way out."""
    there = {manifest.name: manifest for manifest in llm_os.installed_plugins()}
    for name in names:
        if name.startswith("-"):
            continue
        manifest = there.get(name)
        problem = "it is not installed" if manifest is None else manifest.problem
        if problem is not None:
            raise llm_os.ConfigError(
                f"plugin {name!r} is enabled in {path()}, but {problem}; llm-os plugins disable {name} forgets it"
            )


def write_plugins(names: tuple[str, ...]) -> None:
    """Change the list of plugins and nothing else of the file. Raises ConfigError, OSError."""
    text = _text()
    settings = _parse(text)
    line = f"plugins = {json.dumps(names, ensure_ascii=False)}"  # JSON's strings and lists are TOML's
    place = _LIST.search(text) if "plugins" in settings else None
    new = text[: place.start()] + line + text[place.end() :] if place else f"{line}\n{text}"
    try:
        kept = tomllib.loads(new) == {**settings, "plugins": list(names)}
    except tomllib.TOMLDecodeError:
        kept = False
    if not kept:
        raise llm_os.ConfigError(f"{path()} has its plugins in a form that cannot be changed here; write there: {line}")
    _replace(path(), new)


def _text() -> str:
    file = path()
    try:
        with file.open("rb") as opened:
            data = opened.read(_LARGEST + 1)
    except FileNotFoundError:
        return ""
    if len(data) > _LARGEST:
        raise llm_os.ConfigError(f"{file} is larger than {_LARGEST} bytes; shorten it")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise llm_os.ConfigError(f"{file} is not UTF-8 text (at byte {error.start}); repair or remove it") from None


def _parse(text: str) -> dict[str, Any]:
    try:
        settings = tomllib.loads(text)
        if unknown := next((name for name in settings if name not in _FIELDS), None):
            raise llm_os.ConfigError(f"there is no field {unknown!r}; there are {', '.join(_FIELDS)}")
        llm_os.Config(**settings)
    except (tomllib.TOMLDecodeError, llm_os.ConfigError) as error:
        raise llm_os.ConfigError(f"{path()}: {error}; correct or remove it") from None
    return settings


def _replace(file: Path, text: str) -> None:
    """Whole or not at all, and through a link to where the file really is."""
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, prefix=".config-", delete=False) as new:
        try:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
            if file.exists():
                Path(new.name).chmod(file.stat().st_mode)
            Path(new.name).replace(file)
        except BaseException:
            with suppress(OSError):
                Path(new.name).unlink()
            raise
