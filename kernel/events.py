"""What the core is told (events) and what it asks for (actions). Plain data: a trace of both can be replayed.

host calls ──> Submit Fork Kill Renice LoadModel UnloadModel Halt ─┐
operations ──> Completed ─────────────────────────────────────────┤
                                                                   v
                                                     core.step(now, events)
                                                                   │
host  <── Deliver Reply Close ──────────────────────────────────────┤
files <── Open Encode   (operations of the host: image files)      │
device <─ Load Unload Run Copy   (operations of the driver) ───────┘
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from llm_os.kernel.driver import Batch, Footprint, Move, Placement
from llm_os.kernel.image import Image
from llm_os.kernel.request import Chunk, Completion, Request

# -- events ----------------------------------------------------------------------------------------------------------


class Submit(Struct, frozen=True):
    """A new process. `seed` is for sampling, if the request names none."""

    pid: int
    request: Request
    seed: int


class Fork(Struct, frozen=True):
    """A new process that continues another one from here, sharing its pages, with a seed of its own."""

    pid: int
    parent: int
    seed: int


class Kill(Struct, frozen=True):
    """End a process, whatever its state. Unknown pids are ignored: it may have just ended.

    Answered by Reply(ticket), if there is one.
    """

    pid: int
    ticket: int | None = None


class Renice(Struct, frozen=True):
    ticket: int
    pid: int
    nice: int


class LoadModel(Struct, frozen=True):
    """Bring a model to the device now. Answered by Reply(ticket)."""

    ticket: int
    model: str


class UnloadModel(Struct, frozen=True):
    """Take a model off the device; refused while it has processes. Answered by Reply(ticket)."""

    ticket: int
    model: str


class Halt(Struct, frozen=True):
    """End every process, give everything back, stop."""


class Opened(Struct, frozen=True):
    """The result of Open: the image, and what it costs on this device."""

    image: Image
    footprint: Footprint


class Completed(Struct, frozen=True):
    """An operation ended: with its result (Opened, token ids, rows or None), or with an error."""

    operation: int
    result: Any = None
    error: BaseException | None = None


Event = Submit | Fork | Kill | Renice | LoadModel | UnloadModel | Halt | Completed

# -- actions ---------------------------------------------------------------------------------------------------------


class Open(Struct, frozen=True):
    """Open the image of a model by name."""

    id: int
    model: str


class Encode(Struct, frozen=True):
    """Turn a request into token ids."""

    id: int
    image: Image
    request: Request


class Load(Struct, frozen=True):
    id: int
    model: str
    image: Image
    placement: Placement


class Unload(Struct, frozen=True):
    id: int
    model: str


class Run(Struct, frozen=True):
    id: int
    batch: Batch


class Copy(Struct, frozen=True):
    id: int
    model: str
    moves: tuple[Move, ...]


class Deliver(Struct, frozen=True):
    """A piece of an answer. The last one has either `completion` or `error`."""

    pid: int
    chunk: Chunk | None = None
    completion: Completion | None = None
    error: Exception | None = None


class Reply(Struct, frozen=True):
    """The answer to an event with a ticket."""

    ticket: int
    error: Exception | None = None


class Close(Struct, frozen=True):
    """Release an image that nobody will use again. Has no completion."""

    image: Image


Operation = Open | Encode | Load | Unload | Run | Copy
Action = Operation | Deliver | Reply | Close
