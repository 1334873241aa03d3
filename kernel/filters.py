"""What stands between a request and the model, and between the model and the reader: the contract of filters, and the
way through them. No filter.

    request ──open──> request' ──encode──> model ──decode──> text ──push──> text' ──> reader
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Protocol

from msgspec import structs

from llm_os.kernel.events import Deliver
from llm_os.kernel.request import Request


class TextFilter(Protocol):
    """Changes one answer as it streams. Holds state: one per process."""

    def push(self, text: str) -> str:
        """What may be shown now that `text` has come: it may hold back what the next piece could change."""
        ...

    def flush(self) -> str:
        """What is still held back, at the end of the answer, and of each turn of one that is held (`Request.hold`):
        then more is pushed afterwards."""
        ...


class Filter(Protocol):
    """Sees every request of a kernel, and may change it, and its answer.

    Called in the plugin's own thread, one call at a time. The same request must give the same filter again: a fork, or
    a session that is restored after a crash, opens its own and pushes the answer from the beginning.
    """

    def open(self, request: Request) -> tuple[Request, TextFilter | None] | None:
        """Called once per process, before its text is encoded. Returns the request as the model shall see it, and what
        its answer goes through (None: as it is); None to stay out of it. Raises RequestError to refuse it.

        Only `messages`, `prompt` and `tools` of the changed request count.
        """
        ...


class Gate:
    """One process between its request and its reader, where plugins want to see either. Nothing of it runs in the
    kernel's thread: deliveries are worked on in order, by one worker at a time.
    """

    def __init__(
        self,
        workers: Executor,
        open: Callable[[], tuple[Request, list[TextFilter]]],
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
        self._failed = False
        self.request: Future[Request] = Future()  # as the model shall see it
        workers.submit(self._open, open)

    def put(self, item: Deliver) -> None:
        with self._lock:
            self._items.append(item)
            if self._busy:
                return
            self._busy = True
        self._workers.submit(self._drain)

    def _open(self, open: Callable[[], tuple[Request, list[TextFilter]]]) -> None:
        try:
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
            if self._failed:
                continue
            try:
                self._deliver(self._filtered(item))
            except Exception as error:
                self._failed = True
                self._deliver(Deliver(item.pid, error=error))
                self._kill()

    def _filtered(self, item: Deliver) -> Deliver:
        chunk, completion = item.chunk, item.completion
        if item.error is not None:
            return item
        self.request.result()  # a fork, or a restored session, whose filters could not be opened
        if chunk is None or not self._filters:
            return item
        text = chunk.text
        for filter in self._filters:
            text = filter.push(text) + (filter.flush() if completion is not None or chunk.waiting else "")
        self._text.append(text)
        if completion is not None:
            completion = structs.replace(completion, text="".join(self._text))
        return structs.replace(item, chunk=structs.replace(chunk, text=text), completion=completion)
