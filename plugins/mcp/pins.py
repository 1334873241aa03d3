"""The MCP servers that a person has added, and the definitions of their tools as that person saw and approved them.

    {"servers": {"files": {"command": ["mcp-files", "/srv/docs"],
                           "tools": [{"name": ..., "description": ..., "input_schema": ..., "sha256": ...}]}}}

A model is shown what was approved, never what a server says today. A tool whose definition has changed since is not
called until it is approved again: a server that changes its mind after approval ("rug pull") gains nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from llm_os import ConfigError

MAX_TOOLS = 256  # of one server
MAX_DEFINITION = 65536  # bytes of one tool's definition
_MAX_FILE = 64 << 20


class Definition(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tool, as its server describes it."""

    name: str
    description: str
    input_schema: dict[str, Any]
    sha256: str = ""  # of all of the above

    def pinned(self) -> Definition:
        """With its hash."""
        return msgspec.structs.replace(self, sha256=self.fingerprint())

    def fingerprint(self) -> str:
        text = msgspec.json.encode([self.name, self.description, self.input_schema], order="deterministic")
        return hashlib.sha256(text).hexdigest()


class Server(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One server: a program that is started, or an address. `tools` are those that were approved."""

    command: tuple[str, ...] = ()
    env: dict[str, str] = {}  # beside PATH, HOME and the like; secrets belong here, the file is for its owner only
    url: str | None = None
    tools: tuple[Definition, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise ValueError("a server has either a command or a url")


class Pins(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of the file."""

    servers: dict[str, Server] = {}

    @classmethod
    def read(cls, path: Path) -> Pins:
        """Nothing where there is no file. Raises ConfigError."""
        try:
            if path.stat().st_size > _MAX_FILE:
                raise ConfigError(f"{path} is larger than {_MAX_FILE} bytes; it should hold MCP servers")
            pins = msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except (msgspec.DecodeError, ValueError) as error:
            raise ConfigError(f"{path}: {error}; mend it, or remove it and add the servers again") from None
        for name in pins.servers:
            check_name(name)
        return pins

    def check(self, path: Path) -> None:
        """Raises ConfigError where a definition is not the one that was approved."""
        for name, server in self.servers.items():
            for tool in server.tools:
                if tool.sha256 != tool.fingerprint():
                    raise ConfigError(
                        f"{path}: the definition of {tool.name!r} of {name!r} is not what its hash says; "
                        f"llm-os mcp approve {name}"
                    )

    def write(self, path: Path) -> None:
        """All of it or nothing; only its owner may read it. Raises ConfigError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mode 0600
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error

    def with_server(self, name: str, server: Server) -> Pins:
        return Pins(servers={**self.servers, name: server})

    def without(self, name: str) -> Pins:
        return Pins(servers={key: value for key, value in self.servers.items() if key != name})

    def __getitem__(self, name: str) -> Server:
        if name not in self.servers:
            raise ConfigError(f"there is no MCP server {name!r}; llm-os mcp list shows those there are")
        return self.servers[name]


def check_name(name: str) -> None:
    """It becomes part of tools' names."""
    if not re.fullmatch(r"[a-zA-Z0-9_-]{1,24}", name):
        raise ConfigError(f"{name!r} is no name for an MCP server; use 1 to 24 letters, digits, - or _")


def default_path() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "llm-os" / "mcp.json"
