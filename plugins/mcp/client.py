"""Connections to MCP servers, opened with the first call, in one thread with an event loop of its own.

A server's process gets the environment that its entry names and no more than PATH, HOME and the like beside it; what it
prints on stderr is not shown. Its answers are data: text for the model, never instructions to this program.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import anyio
import msgspec
from anyio.from_thread import BlockingPortal, start_blocking_portal

from llm_os import Error, PluginError, Tool
from llm_os.plugins.mcp.pins import MAX_DEFINITION, MAX_TOOLS, Definition, Pins, Server

CONNECT_S = 30.0
CALL_S = 60.0
PING_S = 5.0
MAX_RESULT = 1 << 20  # characters of an answer


class Connection:
    """One server, while it is connected. Its calls are made in the portal's loop."""

    def __init__(self, name: str, server: Server) -> None:
        self.name = name
        self._server = server
        self._client: Any = None
        self._leave: anyio.Event | None = None

    async def run(self, ready: Callable[[BaseException | None], None]) -> None:
        """Connect, call `ready`, and stay so until `leave`: what was opened in a task is closed in it."""
        try:
            from mcp import Client, StdioServerParameters, stdio_client
        except ImportError:
            ready(PluginError("the mcp library is not installed; pip install 'llm-os-runtime[mcp]'"))
            return
        self._leave = anyio.Event()
        try:
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123
                transport: Any = self._server.url
                if transport is None:
                    program, *arguments = self._server.command
                    parameters = StdioServerParameters(command=program, args=arguments, env=dict(self._server.env))
                    transport = stdio_client(parameters, errlog=nowhere)
                with anyio.fail_after(CONNECT_S) as limit:
                    async with Client(transport, read_timeout_seconds=CALL_S) as self._client:
                        limit.deadline = float("inf")
                        ready(None)
                        await self._leave.wait()
        except BaseException as error:
            ready(error if isinstance(error, Exception) else PluginError("the kernel is closed"))
            if not isinstance(error, Exception):
                raise
        finally:
            self._client = None

    def leave(self) -> None:
        if self._leave is not None:
            self._leave.set()

    @property
    def alive(self) -> bool:
        return self._client is not None

    async def answers(self) -> bool:
        """Whether the server is still there."""
        try:
            with anyio.fail_after(PING_S):
                await self._client.list_tools(cache_mode="refresh")
        except Exception:
            return False
        return True

    async def definitions(self) -> tuple[Definition, ...]:
        """What the server says of its tools now. Raises PluginError where that is out of all bounds."""
        found: list[Definition] = []
        cursor = None
        for _ in range(MAX_TOOLS):  # a page may be empty and have a next one
            page = await self._client.list_tools(cursor=cursor, cache_mode="refresh")
            for tool in page.tools:
                found.append(
                    Definition(name=tool.name, description=tool.description or "", input_schema=tool.input_schema)
                )
                if len(found) > MAX_TOOLS:
                    raise PluginError(f"MCP server {self.name!r} has more than {MAX_TOOLS} tools")
                if len(msgspec.json.encode(found[-1])) > MAX_DEFINITION:
                    raise PluginError(
                        f"MCP server {self.name!r}: the definition of {tool.name!r:.80} has over {MAX_DEFINITION} bytes"
                    )
            cursor = page.next_cursor
            if not cursor:
                return tuple(found)
        raise PluginError(f"MCP server {self.name!r} lists its tools on more than {MAX_TOOLS} pages")

    async def call(self, pinned: Definition, arguments: dict[str, Any]) -> str:
        """The text of a tool's answer. Raises PluginError if its definition is not the one that was approved."""
        now = {tool.name: tool for tool in await self.definitions()}.get(pinned.name)
        if now is None or now.fingerprint() != pinned.sha256:
            change = "is gone" if now is None else "has another definition than the one that was approved"
            raise PluginError(
                f"tool {pinned.name!r} of MCP server {self.name!r} {change}; llm-os mcp approve {self.name}"
            )
        result = await self._client.call_tool(pinned.name, arguments, CALL_S)
        text = _text(result)
        if len(text) > MAX_RESULT:
            said = f"tool {pinned.name!r} of MCP server {self.name!r} answered {len(text)} characters"
            raise PluginError(f"{said}; {MAX_RESULT} are the most")
        if result.is_error:
            raise PluginError(f"tool {pinned.name!r} of MCP server {self.name!r}: {text}")
        return text


class Connections:
    """All servers of one kernel. Calls may come from any thread; each waits for its own answer."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {name: threading.Lock() for name in pins.servers}
        self._portal: BlockingPortal | None = None
        self._thread: AbstractContextManager[BlockingPortal] | None = None
        self._open: dict[str, tuple[Connection, Future[Any]]] = {}
        self._closed = False

    def tools(self) -> Iterator[Tool]:
        """The approved tools, as the kernel's."""
        for name, server in self._pins.servers.items():
            for definition in server.tools:
                yield Tool(
                    name=tool_name(name, definition.name),
                    description=definition.description,
                    parameters=definition.input_schema,
                    call=partial(self._call, name, definition),
                    argument_class=lambda _, name=name: f"mcp:{name}",  # type: ignore[misc]
                    timeout_s=CONNECT_S + CALL_S,
                )

    def definitions(self, name: str) -> tuple[Definition, ...]:
        """What a server says now. Raises PluginError."""
        return self._within(name, Connection.definitions)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Leave all servers; the programs among them end."""
        with self._lock:
            self._closed = True
            opened, thread, portal = list(self._open.values()), self._thread, self._portal
            self._open.clear()
        if thread is None or portal is None:
            return
        for connection, task in opened:
            if connection.alive:
                portal.call(connection.leave)
            else:  # it has not answered yet
                task.cancel()
        for _, task in opened:
            with suppress(CancelledError):
                task.exception()
        thread.__exit__(None, None, None)

    def _call(self, name: str, definition: Definition, arguments: Mapping[str, Any]) -> str:
        return str(self._within(name, Connection.call, definition, dict(arguments)))

    def _within(self, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            with self._opening[name]:
                connection, portal = self._connection(name)
            try:
                return portal.call(_limited, method, connection, *arguments)
            except Error:
                raise
            except Exception:
                if not portal.call(connection.answers):
                    self._drop(name, connection)
                raise
        except Error:
            raise
        except Exception as error:
            reason = " ".join(str(_first(error)).split()) or type(error).__name__
            raise PluginError(f"MCP server {name!r}: {reason:.300}") from error

    def _drop(self, name: str, connection: Connection) -> None:
        """The next call connects again."""
        with self._lock:
            if (found := self._open.get(name)) is None or found[0] is not connection:
                return
            del self._open[name]
            portal = self._portal
        assert portal is not None
        portal.call(connection.leave)
        with suppress(CancelledError):
            found[1].exception()

    def _connection(self, name: str) -> tuple[Connection, BlockingPortal]:
        with self._lock:
            if self._closed:
                raise PluginError(f"MCP server {name!r}: the kernel is closed")
            if self._portal is None:
                self._thread = start_blocking_portal("asyncio", name="llm-os-mcp")
                self._portal = self._thread.__enter__()
            portal = self._portal
            found = self._open.get(name)
        if found is not None and found[0].alive:
            return found[0], portal
        connection, ready = Connection(name, self._pins[name]), Future[None]()

        def told(error: BaseException | None) -> None:
            if not ready.done():
                ready.set_exception(error) if error is not None else ready.set_result(None)

        task = portal.start_task_soon(connection.run, told)
        with self._lock:
            if self._closed:
                task.cancel()
            self._open[name] = connection, task
        ready.result(CONNECT_S + 5)
        return connection, portal


async def _limited(method: Callable[..., Any], *arguments: Any) -> Any:
    with anyio.fail_after(2 * CALL_S):
        return await method(*arguments)


def tool_name(server: str, tool: str) -> str:
    """ "files_read": what a model calls it; models' formats allow 64 letters, digits, - and _."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", f"{server}_{tool}")[:64]


def _text(result: Any) -> str:
    """What a model can read of an answer."""
    parts = [part.text if part.type == "text" else f"[{part.type}]" for part in result.content]
    if not parts and result.structured_content is not None:
        return msgspec.json.encode(result.structured_content).decode()
    return "\n".join(parts)


def _first(error: BaseException) -> BaseException:
    """The reason within groups of task groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
