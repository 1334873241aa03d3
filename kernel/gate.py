"""One process on its way through plugins' filters: its request to the model, its answer to the reader. Knows no filter,
and nothing of the core."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress

from msgspec import structs

from llm_os.kernel.errors import PluginError, as_error
from llm_os.kernel.events import Deliver
from llm_os.kernel.filters import TextFilter
from llm_os.kernel.request import Request
from llm_os.kernel.stream import joined, plain

_MAX_ITEMS = 256  # deliveries that wait for a slow filter; what comes after them is joined into one

Opened = tuple[Request, list[TextFilter]]


class Gate:
    """Nothing of it runs in the kernel's thread: deliveries are worked on in order, by one worker at a time."""

    def __init__(
        self,
        workers: Executor,
        open: Callable[[], Opened],
        deliver: Callable[[Deliver], None],
        kill: Callable[[], None],
    ) -> None:
        """`open` asks the plugins; `deliver` takes what has come through; `kill` ends a process whose answer cannot."""
        self._workers = workers
        self._deliver = deliver
        self._kill = kill
        self._lock = threading.Lock()
        self._items: deque[Deliver] = deque()
        self._busy = True  # a worker is at it
        self._filters: list[TextFilter] = []
        self._text: list[str] = []
        self.request: Future[Request] = Future()  # as the model shall see it
        self.done: Future[None] = Future()  # set when its last delivery has gone on
        self._submit(lambda: self._open(open))

    def put(self, item: Deliver) -> None:
        """One more delivery. Never waits."""
        with self._lock:
            if self._over(item) and not self.request.done() and not self._items and not _text(item):
                at_once = True  # it ended before the plugins have answered: they will not be asked
            else:
                at_once = False
                if len(self._items) >= _MAX_ITEMS and plain(item) and plain(self._items[-1]):
                    self._items[-1] = joined(self._items[-1], item)
                else:
                    self._items.append(item)
                if self._busy:
                    return
                self._busy = True
        if at_once:
            self._tell(item)
        else:
            self._submit(self._drain)

    def _submit(self, work: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # Python is exiting, and executors take no more work
            self._workers.submit(work)

    def _open(self, open: Callable[[], Opened]) -> None:
        try:
            if not self.done.done():
                request, self._filters = open()
                self.request.set_result(request)
        except Exception as error:
            self.request.set_exception(error)
        self._drain()

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._items:
                    self._busy = False
                    return
                item = self._items.popleft()
            if self.done.done():
                continue
            try:
                item = self._filtered(item)
            except Exception as error:
                self._tell(Deliver(item.pid, error=as_error(error, PluginError)))
                self._kill()
            else:
                self._tell(item)

    def _tell(self, item: Deliver) -> None:
        if self._over(item):
            with self._lock:
                if self.done.done():
                    return
                self.done.set_result(None)
        self._deliver(item)

    def _filtered(self, item: Deliver) -> Deliver:
        chunk, completion = item.chunk, item.completion
        if item.error is not None:
            return item
        self.request.result()  # of a fork, or a restored session: its filters may have failed to open
        if chunk is None or not self._filters:
            return item
        if item.said:  # by a fork's parent: part of the answer, but not told again
            self._text.append(self._pushed(item.said, flush=False))
        text = self._pushed(chunk.text, flush=completion is not None or chunk.waiting)
        self._text.append(text)
        if completion is not None:
            completion = structs.replace(completion, text="".join(self._text))
        return structs.replace(item, chunk=structs.replace(chunk, text=text), completion=completion)

    def _pushed(self, text: str, *, flush: bool) -> str:
        for filter in self._filters:
            text = filter.push(text) + (filter.flush() if flush else "")
        return text

    @staticmethod
    def _over(item: Deliver) -> bool:
        return item.error is not None or item.completion is not None


def _text(item: Deliver) -> bool:
    """Whether it says anything that a filter would have to see."""
    return any(part is not None and part.text for part in (item.chunk, item.completion))
