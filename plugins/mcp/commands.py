"""`llm-os mcp`: add and approve servers, and be one. The only place where a person is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import anyio
import msgspec

import llm_os
from llm_os import ConfigError
from llm_os.plugins.mcp.pins import Definition, Pins, Server, check_name, default_path


def mcp(
    action: Literal["list", "add", "approve", "remove", "serve"] = "list",
    name: str | None = None,
    /,
    *command: str,
    url: str | None = None,
    yes: bool = False,
    port: int | None = None,
    memory: str | None = None,
    file: Path | None = None,
) -> int:
    """Use tools of MCP servers, or serve this machine's models to MCP clients.

    list               the servers, and the tools that were approved
    add NAME COMMAND   add a server that is started as COMMAND (or --url URL), and approve its tools
    approve NAME       look at a server's tools again, and approve what has changed
    remove NAME        forget a server
    serve              be an MCP server: over stdin and stdout, or HTTP on loopback with --port

    Parameters
    ----------
    action
        What to do.
    name
        Of the server.
    command
        The program of the server and its arguments.
    url
        Of a server that is reached over HTTP.
    yes
        Approve without asking.
    port
        Serve over HTTP at http://127.0.0.1:PORT/mcp.
    memory
        The kernel's budget when it serves, such as 2GiB.
    file
        Where servers and approvals are kept, if not in ~/.config/llm-os/mcp.json.
    """
    if action == "serve":
        return _serve(port, memory)
    path = file or default_path()
    pins = Pins.read(path)
    if action == "list":
        _list(pins)
        return 0
    if name is None:
        raise ConfigError(f"llm-os mcp {action} needs the name of a server")
    check_name(name)
    if action == "remove":
        pins[name]
        pins.without(name).write(path)
        return 0
    if action == "add":
        if name in pins.servers:
            raise ConfigError(f"there is an MCP server {name!r} already; llm-os mcp remove {name}, or use another name")
        if bool(command) == (url is not None):
            raise ConfigError(f"give either a command or --url: llm-os mcp add {name} COMMAND...")
        server = Server(command=command, url=url)
    else:
        server = pins[name]
    approved = _approve(name, server, yes)
    if approved is None:
        return 1
    pins.with_server(name, msgspec.structs.replace(server, tools=approved)).write(path)
    print(f"{name}: {len(approved)} tools approved")
    return 0


def _list(pins: Pins) -> None:
    if not pins.servers:
        print("no MCP servers; llm-os mcp add NAME COMMAND... adds one")
    for name, server in sorted(pins.servers.items()):
        print(f"{name}  {server.url or ' '.join(server.command)}")
        for tool in server.tools:
            print(_shown(f"  {tool.name}  {tool.description.strip().partition(chr(10))[0]:.100}"))


def _approve(name: str, server: Server, yes: bool) -> tuple[Definition, ...] | None:
    """What the server has now, if a person says so."""
    from llm_os.plugins.mcp.client import Connections, tool_name

    connections = Connections(Pins(servers={name: server}))
    try:
        found = connections.definitions(name)
    finally:
        connections.close()
    taken: dict[str, str] = {}
    for tool in found:
        other = taken.setdefault(tool_name(name, tool.name), tool.name)
        if other != tool.name:
            raise ConfigError(f"tools {other!r} and {tool.name!r} of {name} would both be {tool_name(name, other)!r}")
    before = {tool.name: tool for tool in server.tools}
    now = {tool.name: tool.pinned() for tool in found}
    changed = [tool for tool in now.values() if before.get(tool.name) != tool]
    for tool in changed:
        print(_shown(f"{'changed' if tool.name in before else 'new'}: {tool.name}"))
        print(_shown(f"  {tool.description}"))
        print(_shown(f"  {msgspec.json.encode(tool.input_schema).decode()}"))
    for gone in sorted(before.keys() - now.keys()):
        print(_shown(f"gone: {gone}"))
    if changed and not yes:
        print("A model will read these descriptions, and may ask for these tools.")
        if not sys.stdin.isatty():
            raise ConfigError("nobody can be asked here; --yes approves them")
        if input(f"Approve {len(changed)} tools of {name}? [y/N] ").strip().lower() not in ("y", "yes"):
            return None
    return tuple(now.values())


def _shown(text: str) -> str:
    """A server's text, without what could move the cursor or hide: what is not seen is written out."""
    return "".join("\n  " if c == "\n" else c if _seen(c) else f"\\u{ord(c):04x}" for c in text)


def _seen(character: str) -> bool:
    """Not for variation selectors, fillers and joiners, which print as nothing (Default_Ignorable_Code_Point)."""
    code = ord(character)
    ignorable = code in (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0) or 0xFE00 <= code <= 0xFE0F
    return character.isprintable() and not ignorable and not 0xE0000 <= code <= 0xE0FFF


def _serve(port: Annotated[int | None, "loopback"], memory: str | None) -> int:
    from llm_os.plugins.mcp.serve import build

    with llm_os.Kernel(llm_os.Config(memory=memory)) as kernel:
        server = build(kernel)
        if port is None:
            anyio.run(server.run_stdio_async)
        else:
            print(f"MCP at http://127.0.0.1:{port}/mcp; Ctrl-C ends it", file=sys.stderr)

            async def serve() -> None:
                await server.run_streamable_http_async(host="127.0.0.1", port=port)

            anyio.run(serve)
    return 0
