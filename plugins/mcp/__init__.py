"""MCP, the Model Context Protocol: tools of MCP servers for this kernel, and this kernel as an MCP server.

    pins.py       which servers there are, and which of their tools a person has approved, in a file
    client.py     connections to them, and calls
    serve.py      this kernel's models, for other programs
    commands.py   `llm-os mcp`

Nothing here imports the `mcp` library before it is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_os import Config, ConfigError, RegisterCommand, RegisterTool, hookimpl
from llm_os.plugins.mcp.pins import Pins, default_path

if TYPE_CHECKING:
    from llm_os.plugins.mcp.client import Connections


class Mcp:
    """The plugin, one for each kernel."""

    def __init__(self) -> None:
        self._connections: Connections | None = None

    @hookimpl
    def register_tools(self, register: RegisterTool, config: Config) -> None:
        """The approved tools of all servers. No server is started before one of its tools is called."""
        pins = Pins.read(_path(config))
        pins.check(_path(config))
        if not pins.servers:
            return
        from llm_os.plugins.mcp.client import Connections

        self._connections = Connections(pins)
        for tool in self._connections.tools():
            register(tool)

    @hookimpl
    def register_commands(self, register: RegisterCommand) -> None:
        from llm_os.plugins.mcp.commands import mcp

        register("mcp", mcp, "Use tools of MCP servers, or serve this machine's models to MCP clients.")

    @hookimpl
    def halting(self) -> None:
        if self._connections is not None:
            self._connections.close()


def _path(config: Config) -> Path:
    options = config.options.get("mcp", {})
    if unknown := sorted(set(options) - {"file"}):
        raise ConfigError(f"options of plugin 'mcp' have no field {unknown[0]!r}; they have file")
    return Path(options["file"]) if "file" in options else default_path()
