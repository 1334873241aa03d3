"""What stands between a request and the model, and between the model and the reader: the contract. Holds no filter.

request ──open──> request' ──encode──> model ──decode──> text ──push──> text' ──> reader
"""

from __future__ import annotations

from typing import Protocol

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

    Called in the plugin's own thread, one call at a time: a slow filter makes all wait that go through it. The same
    request must give the same filter again: a fork, or a session that is restored after a crash, opens its own and
    pushes the answer from the beginning.
    """

    def open(self, request: Request) -> tuple[Request, TextFilter | None] | None:
        """Called once per process, before its text is encoded. Returns the request as the model shall see it, and what
        its answer goes through (None: as it is); None to stay out of it. Raises RequestError to refuse it.

        Only `messages`, `prompt` and `tools` of the changed request count. `request` is the filter's own copy. What is
        not text passes unfiltered: token ids and log-probabilities are what the model said.
        """
        ...
