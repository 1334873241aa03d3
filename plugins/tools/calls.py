"""Runs the calls of one turn: checked, permitted, within limits, all at once. Knows no model and no kernel.

    call ──known?──fits its schema?──permitted?──> run, with time and output limits ──> Result
                 └────────────── no ──────────────────────────────────────────────────> Result, an error for the model

A coroutine that overruns its time is cancelled. A plain function runs in a thread of its own, and Python cannot end a
thread: it is left behind, and goes on until it returns or the program ends. Of one tool at most `LEFT_BEHIND` may.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
from msgspec import Struct

from llm_os import RequestError, Tool
from llm_os.plugins.tools.parsers import Call
from llm_os.plugins.tools.permissions import Permissions
from llm_os.plugins.tools.validate import Misfit, check

LEFT_BEHIND = 4


class Result(Struct, frozen=True, kw_only=True):
    """What came of a call."""

    call: Call
    text: str
    error: bool = False  # it was not run, or it failed: `text` says why


class Toolbox:
    """The tools of one conversation."""

    def __init__(self, tools: Sequence[Tool], permissions: Permissions) -> None:
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            names = [tool.name for tool in tools]
            twice = next(name for name in names if names.count(name) > 1)
            raise RequestError(f"two tools are named {twice!r}; leave one of them out")
        self._permissions = permissions
        self._behind: dict[str, list[threading.Thread]] = {}

    def expected_s(self, calls: Sequence[Call]) -> float | None:
        """How long they take together, as far as their tools say."""
        known = [t.expected_s for call in calls if (t := self._tools.get(call.name)) and t.expected_s is not None]
        return max(known, default=None)

    async def run(self, calls: Sequence[Call]) -> list[Result]:
        """One Result for each call, in order. Questions are asked one after the other, then tools run side by side.
        Cancelling it cancels them."""
        results: dict[int, Result] = {}
        ready: list[tuple[int, Tool, dict[str, Any]]] = []
        for index, call in enumerate(calls):
            arguments = deepcopy(call.arguments)
            refusal = await self._refusal(call, arguments)
            if refusal is None:
                ready.append((index, self._tools[call.name], deepcopy(call.arguments)))
            else:
                results[index] = Result(call=call, text=refusal, error=True)

        async def run(index: int, tool: Tool, arguments: dict[str, Any]) -> None:
            results[index] = await self._run(calls[index], tool, arguments)

        async with anyio.create_task_group() as tasks:
            for entry in ready:
                tasks.start_soon(run, *entry)
        return [results[index] for index in range(len(calls))]

    async def _refusal(self, call: Call, arguments: dict[str, Any]) -> str | None:
        if call.error is not None:
            return call.error
        tool = self._tools.get(call.name)
        if tool is None:
            return f"there is no tool {call.name!r}; there are: {', '.join(self._tools) or 'none'}"
        try:
            check(arguments, tool.parameters)
        except Misfit as misfit:
            return f"the arguments do not fit: {misfit}"
        except Exception as error:  # a schema that is none
            return f"the arguments cannot be checked: {_line(error)}"
        return await self._permissions.check(tool, arguments)

    async def _run(self, call: Call, tool: Tool, arguments: dict[str, Any]) -> Result:
        text, failed = f"it took longer than {tool.timeout_s:g} s and was stopped", True
        limit = tool.timeout_s if math.isfinite(tool.timeout_s) else None
        try:
            with anyio.move_on_after(limit):
                text, failed = _text(await self._value(tool, arguments)), False
        except Exception as error:
            text = _line(error)
        if len(text) > tool.output_limit:
            cut = len(text) - tool.output_limit
            text = f"{text[: tool.output_limit]}\n[{cut} more characters were cut off]"
        return Result(call=call, text=text, error=failed)

    async def _value(self, tool: Tool, arguments: dict[str, Any]) -> Any:
        call = tool.call
        if inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None)):  # noqa: B004
            return await _awaited(call(arguments))
        behind = self._behind[tool.name] = [thread for thread in self._behind.get(tool.name, ()) if thread.is_alive()]
        if len(behind) >= LEFT_BEHIND:
            raise RuntimeError(f"{len(behind)} earlier calls of it have not ended yet")
        value = await _in_thread(tool.name, call, arguments, behind)
        return await value if inspect.isawaitable(value) else value


async def _awaited(value: Any) -> Any:
    try:
        return await value
    except SystemExit as error:  # it ends the call, not the host
        raise RuntimeError(_line(error)) from error


async def _in_thread(
    name: str, call: Callable[[Mapping[str, Any]], Any], arguments: dict[str, Any], behind: list[threading.Thread]
) -> Any:
    """What `call(arguments)` returns, in a thread that the program does not wait for at its end. Where it is cancelled,
    the thread is added to `behind`."""
    done, answer = anyio.Event(), list[tuple[Any, BaseException | None]]()
    loop: Any = anyio.lowlevel.current_token().native_token
    soon = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon  # asyncio's name, trio's name

    def work() -> None:
        try:
            answer.append((call(arguments), None))
        except BaseException as error:
            answer.append((None, error))
        try:
            soon(done.set)
        except RuntimeError:  # the loop has closed
            return

    thread = threading.Thread(target=work, name=f"llm-os-tool-{name}", daemon=True)
    thread.start()
    try:
        await done.wait()
    except BaseException:
        behind.append(thread)
        raise
    value, error = answer[0]
    if isinstance(error, Exception):
        raise error
    if error is not None:  # SystemExit and the like end the call, not the host
        raise RuntimeError(_line(error))
    return value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RuntimeError(f"it answered {type(value).__name__}, which is neither text nor JSON ({error})") from None


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:2000]
