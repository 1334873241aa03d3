"""Aliases: short names of models, each with sources in order of preference and the hash that all of them must have.

The shipped ones lie beside this file; a user's own file has the same schema and wins:

    {"smollm2:135m": {"sources": [{"source": "pip:…", "sha256": "…", "bytes": 98362432, "download_bytes": 92871040}]}}

Reads JSON and checks it. Does not know whether a source can be reached.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from llm_os.drivers.store import names
from llm_os.kernel.errors import ConfigError, StoreError

SHIPPED = Path(__file__).with_name("aliases.json")
_LONGEST = 4 << 20


class AliasSource(Struct, frozen=True, forbid_unknown_fields=True):
    """One place to get a model from.

    `sha256` is of the model file; of a directory (`hf:org/repo`), of what `sha256sum` prints for its files, sorted by
    name. `bytes` is the model's length, `download_bytes` what crosses the network if that differs (a wheel is packed).
    """

    source: str
    sha256: str
    bytes: int | None = None
    download_bytes: int | None = None


class Alias(Struct, frozen=True, forbid_unknown_fields=True):
    sources: tuple[AliasSource, ...]


def load(user: Path | None) -> dict[str, Alias]:
    """The shipped aliases and those in the file `user`, if it exists. Raises ConfigError naming file and alias."""
    aliases = _read(SHIPPED)
    if user is not None and user.is_file():
        aliases.update(_read(user))
    return aliases


def _read(path: Path) -> dict[str, Alias]:
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise ConfigError(f"alias file {path} is longer than {_LONGEST} bytes")
        aliases = msgspec.json.decode(text, type=dict[str, Alias])
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"alias file {path} cannot be used: {error}") from error
    for name, alias in aliases.items():
        _check(path, name, alias)
    return aliases


def _check(path: Path, name: str, alias: Alias) -> None:
    where = f"alias file {path}: {names.shown(name)}"
    if not names.is_alias(name):
        raise ConfigError(
            f"{where} is no alias: write name:variant in a-z, 0-9, '.', '_', '-', without hf:, pip:, file:"
        )
    if not alias.sources:
        raise ConfigError(f"{where} has no sources; give at least one")
    for source in alias.sources:
        if not names.is_sha256(source.sha256):
            raise ConfigError(f"{where}: sha256 of {names.shown(source.source)} must be 64 digits of 0-9a-f")
        if any(count is not None and count <= 0 for count in (source.bytes, source.download_bytes)):
            raise ConfigError(f"{where}: bytes and download_bytes of {names.shown(source.source)} must be positive")
        try:
            names.source(source.source)
        except StoreError as error:
            raise ConfigError(f"alias file {path}: {error}") from error
