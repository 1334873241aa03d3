"""What hosts call: every call becomes an event in the inbox of the kernel's thread (`loop.py`), or reads a snapshot.

The kernel has a thread of its own (docs/decisions/0001), so it neither needs nor disturbs its host's event loop.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import anyio
from msgspec import structs

from llm_os.kernel import events as ev
from llm_os.kernel.config import Config, show_bytes
from llm_os.kernel.core import Core
from llm_os.kernel.disk import Disk
from llm_os.kernel.driver import Driver
from llm_os.kernel.errors import Closed, ConfigError, RequestError
from llm_os.kernel.image import Image
from llm_os.kernel.journal import check_storable
from llm_os.kernel.loop import Loop
from llm_os.kernel.memory import MemoryInfo
from llm_os.kernel.plugins import Plugins
from llm_os.kernel.process import ProcessInfo
from llm_os.kernel.request import Completion, Request
from llm_os.kernel.residency import ModelInfo
from llm_os.kernel.stream import Mailbox, Stream, thread_safe
from llm_os.kernel.tool import Tool

T = TypeVar("T")


class Kernel:
    """One device and its models. Use as `with` or `async with`, from any thread, under asyncio, trio or neither.

    Booting raises ConfigError or DriverError. Every call below may be made from any thread; `close` gives back every
    byte, thread and file, and whoever still waits gets Closed.
    """

    def __init__(self, config: Config | None = None) -> None:
        config = config or Config()
        with ExitStack() as opened:  # given back where the boot fails
            plugins = opened.enter_context(closing(Plugins(config)))
            driver = opened.enter_context(closing(plugins.open_driver()))
            policy, drafters = plugins.open_policy(), plugins.drafters
            core = Core(config, _budget(config, driver), policy, plugins.pick_victim, drafters)
            disk = opened.enter_context(closing(Disk(config, plugins)))
            plugins.tell("booted", config=config, device=driver.info())
            self._boot(core, driver, plugins, disk)
            opened.pop_all()

    def _boot(self, core: Core, driver: Driver, plugins: Plugins, disk: Disk) -> None:
        self._loop = Loop(core, driver, plugins, disk)
        self._ids = itertools.count(disk.last_pid + 1)
        self.recovered = tuple(disk.sessions)  # pids of sessions of an earlier life, which go on
        for pid, session in disk.sessions.items():
            self._loop.mailboxes[pid] = self._loop.unclaimed[pid] = Mailbox()
            self._loop.inbox.put(ev.Restore(pid, session))
        self._thread = threading.Thread(target=self._loop.run, name="llm-os-kernel", daemon=True)
        self._thread.start()
        self._halt = weakref.finalize(self, _halt, self._loop, self._thread)

    # -- processes ---------------------------------------------------------------------------------------------------

    def stream(self, request: Request) -> Stream:
        """Start a process and return its stream; the model is loaded if it is not there. Returns at once."""
        _check_type("request", request, Request)
        if self._loop.core.outbox.journaled:
            check_storable(request)
        return self._spawn(lambda pid: ev.Submit(pid, request, _draw()))

    def fork(self, pid: int) -> Stream:
        """A second answer that continues from where process `pid` is now, sharing its pages, with a new seed."""
        _check_type("pid", pid, int)
        return self._spawn(lambda child: ev.Fork(child, pid, _draw()))

    def samples(self, request: Request, count: int) -> list[Stream]:
        """Several answers to one request, each with its own seed, counting up from the request's if it has one. The
        prompt is computed once, its pages are shared. Blocks for one turn."""
        _check_type("count", count, int)
        if not 1 <= count <= 1024:
            raise RequestError(f"count is {count}; it must be from 1 to 1024")
        _check_type("request", request, Request)
        seed = request.sampling.seed
        seeds = [_draw() if seed is None else (seed + index) % 2**64 for index in range(1, count)]
        with self._loop.turn:  # a short answer would have ended before the last of them came
            first = self.stream(request)
            return [first, *(self._spawn(partial(_sibling, first.pid, seed)) for seed in seeds)]

    def attach(self, pid: int) -> Stream:
        """The stream of a session of an earlier life (`recovered`), from its first token on. Raises RequestError for
        any other pid, and for one that has been attached to."""
        _check_type("pid", pid, int)
        mailbox = self._loop.unclaimed.pop(pid, None)
        if mailbox is None:
            raise RequestError(f"there is no unattached session {pid}; recovered are {list(self._loop.unclaimed)}")
        return self._stream(pid, mailbox)

    async def generate(self, request: Request) -> Completion:
        """The whole answer. Raises RequestError, ModelError or DriverError. Cancelling the call ends the process."""
        return await self.stream(request).collect()

    async def kill(self, pid: int) -> None:
        """End a process; its stream gets a last chunk with finish_reason "cancelled". No error if it has ended."""
        _check_type("pid", pid, int)
        await _wait(self._ask(lambda ticket: ev.Kill(pid, ticket)))

    async def block(self, pid: int, expected_s: float | None = None) -> None:
        """Stop a process before its next token, until `unblock`: it waits for a tool. Returns when it has stopped.

        Its KV stays, unless room is needed: then it is swapped, or dropped and computed again later, whichever is
        quicker; those that will wait longest go first (`expected_s`, seconds). The answer does not depend on it. For a
        process that is held (`Request.hold`), it only says how long that will take.
        Raises RequestError if it has ended, or ends before it could stop.
        """
        _check_type("pid", pid, int)
        if expected_s is not None and not (isinstance(expected_s, int | float) and 0 <= expected_s <= 1e9):
            raise RequestError(f"expected_s is {expected_s!r}; it must be seconds, from 0 to 1e9")
        await _wait(self._ask(lambda ticket: ev.Block(ticket, pid, expected_s)))

    async def unblock(self, pid: int, tokens: Sequence[int] = ()) -> None:
        """Let a blocked process go on, after `tokens` (ids): what the tool said, as part of its context. They count as
        neither prompt nor answer. Raises RequestError if it is not blocked, or if they do not fit its context."""
        _check_type("pid", pid, int)
        _check_type("tokens", tokens, Sequence)
        given = tuple(tokens)
        await _wait(self._ask(lambda ticket: ev.Unblock(ticket, pid, given)))

    async def finish(self, pid: int) -> None:
        """End a process that is held after its turn (`Request.hold`): its answer is whole, finish_reason "stop". Raises
        RequestError if it is not held."""
        _check_type("pid", pid, int)
        await _wait(self._ask(lambda ticket: ev.Finish(ticket, pid)))

    def image(self, pid: int) -> Image:
        """The model that a live process runs: its tokenizer and chat template, to be used as long as the process lives.
        Raises RequestError if it has ended, or its model file is still being opened."""
        _check_type("pid", pid, int)
        with self._loop.turn:
            process = self._loop.core.processes.get(pid)
        if process is None or process.image is None:
            raise RequestError(f"process {pid} has ended or has not started")
        return process.image

    def nice(self, pid: int, nice: int) -> None:
        """Change the class of a process: -20 is served first, 19 last. Blocks for one turn. Raises RequestError."""
        _check_type("pid", pid, int)
        _check_type("nice", nice, int)
        if not -20 <= nice <= 19:
            raise RequestError(f"nice is {nice}; it must be from -20 to 19")
        self._ask(lambda ticket: ev.Renice(ticket, pid, nice)).result()

    # -- tools -------------------------------------------------------------------------------------------------------

    @property
    def tools(self) -> tuple[Tool, ...]:
        """Those that plugins offer. Nothing runs them unless it is told to (docs/write-a-plugin.md)."""
        return self._loop.plugins.tools

    # -- models ------------------------------------------------------------------------------------------------------

    async def load(self, model: str, *, pin: bool = False) -> None:
        """Bring a model to the device, evicting others if it must; a pinned one stays until `unload` or `unpin`.

        Raises ModelError, Refused (with the bytes needed and free) or DriverError."""
        _check_type("model", model, str)
        await _wait(self._ask(lambda ticket: ev.LoadModel(ticket, model, pin=pin)))

    async def unpin(self, model: str) -> None:
        """Let others take the place of a pinned model again. Raises ModelNotFound."""
        _check_type("model", model, str)
        await _wait(self._ask(lambda ticket: ev.Pin(ticket, model, False)))

    async def prefetch(self, model: str) -> None:
        """Bring a model near, into host memory, so that its load will be quick. Returns when that has begun."""
        _check_type("model", model, str)
        await _wait(self._ask(lambda ticket: ev.LoadModel(ticket, model, prefetch=True)))

    async def unload(self, model: str) -> None:
        """Give back a model's memory: its weights, and the KV that is cached for it. Raises ModelNotFound, or Refused
        while processes use it."""
        _check_type("model", model, str)
        await _wait(self._ask(lambda ticket: ev.UnloadModel(ticket, model)))

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def ps(self) -> list[ProcessInfo]:
        """Live processes, in order of arrival."""
        with self._loop.turn:
            return self._loop.core.ps()

    def memory(self) -> MemoryInfo:
        """The ledger, in bytes, and beside it what the driver says that it has allocated."""
        device = self._loop.driver.memory()
        with self._loop.turn:
            return structs.replace(self._loop.core.memory_info(), driver=device.weights + device.kv)

    def models(self) -> list[ModelInfo]:
        """Models that are open, on their way, or on the device."""
        with self._loop.turn:
            return self._loop.core.residency.infos()

    # -- life --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End every process, unload every model, join every thread. Idempotent; blocks until it is done."""
        self._halt()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if kind is not GeneratorExit:  # else the loop has gone and took the coroutine with it: nothing can be awaited
            self._loop.halt()
            with anyio.CancelScope(shield=True):
                await _wait(self._loop.ended)
        self.close()

    def _spawn(self, submit: Callable[[int], ev.Event]) -> Stream:
        mailbox = Mailbox()
        with self._loop.gate:
            pid = next(self._ids)  # pids reach the inbox in order
            if self._loop.closed is None:
                self._loop.mailboxes[pid] = mailbox
                self._loop.inbox.put(submit(pid))
            else:
                mailbox.put(ev.Deliver(pid, error=Closed(self._loop.closed)))
        return self._stream(pid, mailbox)

    def _stream(self, pid: int, mailbox: Mailbox) -> Stream:
        return Stream(pid, mailbox, partial(_forget, self._loop, pid), partial(_acknowledge, self._loop, pid))

    def _ask(self, question: Callable[[int], ev.Event]) -> Future[None]:
        ticket, future = next(self._ids), Future[None]()
        with self._loop.gate:
            if self._loop.closed is None:
                self._loop.tickets[ticket] = future
                self._loop.inbox.put(question(ticket))
            else:
                future.set_exception(Closed(self._loop.closed))
        return future


def _budget(config: Config, driver: Driver) -> int:
    """Raises ConfigError where the device has not so much memory."""
    info = driver.info()
    budget = config.budget(info.free_bytes)
    if budget > info.total_bytes:
        raise ConfigError(f"memory is {config.memory}; {info.device} has {show_bytes(info.total_bytes)}")
    return budget


def _halt(loop: Loop, thread: threading.Thread) -> None:
    """Runs once: by close(), at exit, or when a forgotten Kernel is collected, which may happen in any thread, even one
    that the kernel's thread is waiting for: only close() and the main thread may wait."""
    loop.halt()
    if threading.current_thread() is threading.main_thread():
        thread.join()


def _forget(loop: Loop, pid: int) -> None:
    """The reader has gone: deliver no more, and end the process."""
    loop.mailboxes.pop(pid, None)
    loop.inbox.put(ev.Kill(pid))


def _acknowledge(loop: Loop, pid: int) -> None:
    """The reader has the whole answer."""
    if loop.core.outbox.journaled:
        loop.inbox.put(ev.Forget(pid))


def _draw() -> int:
    """A seed."""
    return int.from_bytes(os.urandom(8), "little")


def _sibling(parent: int, seed: int, child: int) -> ev.Event:
    return ev.Fork(child, parent, seed, from_prompt=True)


def _check_type(name: str, value: object, kind: type) -> None:
    """A wrong type stops at the door. Raises RequestError."""
    if not isinstance(value, kind):
        raise RequestError(f"{name} must be {kind.__name__}, not {type(value).__name__}")


async def _wait(future: Future[T]) -> T:
    """Await a future of another thread without blocking a worker thread for it."""
    done = anyio.Event()
    wake = thread_safe(done.set)
    future.add_done_callback(lambda _: wake())
    await done.wait()
    return future.result()
