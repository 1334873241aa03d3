"""The caller's end of a process: chunks, from any thread, from asyncio, trio or plain code."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.lowlevel

from llm_os.kernel.errors import Closed
from llm_os.kernel.events import Deliver
from llm_os.kernel.request import Chunk, Completion

_MAX_ITEMS = 256  # chunks that wait for a slow reader; what comes after them is joined into one


class Mailbox:
    """Hands deliveries from the kernel's thread to one reader. Never blocks the kernel, whatever the reader does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: deque[Deliver] = deque()
        self._wake: Callable[[], object] | None = None

    def put(self, item: Deliver) -> None:
        with self._lock:
            if len(self._items) >= _MAX_ITEMS and plain(item) and plain(self._items[-1]):
                self._items[-1] = joined(self._items[-1], item)
            else:
                self._items.append(item)
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def get(self, timeout: float | None = None) -> Deliver:
        """Blocks this thread. Raises TimeoutError."""
        ready = threading.Lock()  # waiting for an Event costs ten times as much, for every token of every reader
        ready.acquire()
        while (item := self._take(ready.release)) is None:
            if not ready.acquire(timeout=-1 if timeout is None else timeout):
                raise TimeoutError
        return item

    async def receive(self) -> Deliver:
        """Waits in the running event loop, asyncio's or trio's. Always a checkpoint, so a flood can be cancelled."""
        await anyio.lowlevel.checkpoint()
        ready = anyio.Event()
        wake = thread_safe(ready.set)
        while (item := self._take(wake)) is None:
            await ready.wait()
            ready = anyio.Event()
            wake = thread_safe(ready.set)
        return item

    def _take(self, wake: Callable[[], object]) -> Deliver | None:
        with self._lock:
            if self._items:
                return self._items.popleft()
            self._wake = wake
            return None


class Stream:
    """An answer as it comes. Iterate with `for` or `async for`; leaving early, or dropping it, ends the process.

    `completion` is the whole answer once the iteration has ended. An error of the request is raised by the iteration.
    """

    def __init__(
        self, pid: int, mailbox: Mailbox, kill: Callable[[], object], acknowledge: Callable[[], object]
    ) -> None:
        """`kill` is called once if the reader leaves early, `acknowledge` once when it has the whole answer."""
        self.pid = pid
        self.completion: Completion | None = None
        self._mailbox = mailbox
        self._kill = weakref.finalize(self, kill)
        self._kill.atexit = False
        self._acknowledge = acknowledge

    def close(self) -> None:
        """End the process if it has not ended. Idempotent; never waits."""
        self._kill()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if not self._kill.alive:
            raise StopIteration
        return self._accept(self._mailbox.get())

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if not self._kill.alive:
            await anyio.lowlevel.checkpoint()
            raise StopAsyncIteration
        try:
            delivery = await self._mailbox.receive()
        except BaseException:
            del self  # the traceback keeps this frame: a stream that nobody else holds must go all the same
            raise
        return self._accept(delivery)

    def result(self) -> Completion:
        """Block until the answer is whole. Raises what the iteration raises."""
        with self:
            for _ in self:
                pass
        return self._whole()

    async def collect(self) -> Completion:
        """Wait until the answer is whole. A cancelled wait ends the process."""
        with self:
            async for _ in self:
                pass
        return self._whole()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _accept(self, delivery: Deliver) -> Chunk:
        if delivery.error is not None:
            self._kill.detach()
            raise delivery.error.with_traceback(None)  # one error may be told to many: it must not keep their frames
        if delivery.completion is not None:
            self._kill.detach()
            self._acknowledge()
            self.completion = delivery.completion
        assert delivery.chunk is not None
        return delivery.chunk

    def _whole(self) -> Completion:
        if self.completion is None:
            raise Closed("the stream was closed before the answer was whole")
        return self.completion


def plain(item: Deliver) -> bool:
    """Whether it may be joined with its like."""
    return item.chunk is not None and not item.chunk.waiting and item.completion is None and item.error is None


def joined(one: Deliver, other: Deliver) -> Deliver:
    """Two plain ones as one."""
    a, b = one.chunk, other.chunk
    assert a is not None and b is not None
    chunk = Chunk(text=a.text + b.text, token_ids=a.token_ids + b.token_ids, logprobs=a.logprobs + b.logprobs)
    return Deliver(one.pid, chunk, said=one.said)


def thread_safe(callback: Callable[[], object]) -> Callable[[], object]:
    """`callback`, callable from any thread: it will run in the event loop that is running now, if that still runs."""
    loop: Any = anyio.lowlevel.current_token().native_token
    soon = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon  # asyncio's name, trio's name

    def wake() -> None:
        try:
            soon(callback)
        except RuntimeError:  # the loop has closed (trio's RunFinishedError is one too): nobody waits any more
            return

    return wake
