"""Who guesses what comes next: the contract of drafters. A guess is checked by the model in the pass that would have
been run anyway, so a wrong one costs time and never changes an answer.

    tokens so far ──guess──> what may come next ──fed behind the last token──> as many as were right are kept
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from llm_os.kernel.image import Image


class DraftContext(Struct, frozen=True, kw_only=True):
    """Whose text it is."""

    pid: int
    tenant: str  # what is learnt from one tenant's text must not be used for another's: speed tells what was there
    model: str
    image: Image


class Draft(Protocol):
    """Follows one process. Holds state: one per process."""

    def guess(self, new: Sequence[int], limit: int) -> Sequence[int]:
        """The token ids that will come next, at most `limit`, the likely ones only; () for no idea.

        `new` are the tokens of the process since the last call, at first its prompt, or all that a fork has. Called at
        most once per step, in the kernel's thread: take microseconds, no lock, no file, no socket.
        """
        ...


class Drafter(Protocol):
    """Guesses for the processes of a kernel. One that raises, or takes too long, is off; answers never change by it."""

    def open(self, context: DraftContext) -> Draft | None:
        """Called once per process, when it is to get guesses for the first time, in the kernel's thread. None to stay
        out of it."""
        ...
