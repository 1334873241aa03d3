"""What the core is told (events) and what it asks for (actions). Plain data: a trace of both can be replayed.

host calls ──> Submit Fork Restore Forget Kill Renice Block Unblock Finish LoadModel UnloadModel Pin Halt ─┐
operations ──> Completed ──────────────────────────────────────────────────────────────────────────┤
                                                                                                    v
                                                                                      core.step(now, events)
                                                                                                    │
host  <── Deliver Reply Close ──────────────────────────────────────────────────────────────────────┤
files <── Open Encode Compile Journal    (operations of the host) ──────────────────────────────────┤
swap  <── SwapOut SwapIn Demote Discard    (between device, host memory and disk) ──────────┤
device <─ Load Unload Release Prefetch Run Copy    (operations of the driver) ──────────────────────┘
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from llm_os.kernel.driver import Batch, Footprint, Move, Placement
from llm_os.kernel.grammar import Grammar
from llm_os.kernel.image import Image
from llm_os.kernel.journal import Record, Session
from llm_os.kernel.request import Chunk, Completion, Request

Tier = Literal["host", "disk"]

# -- events ----------------------------------------------------------------------------------------------------------


class Submit(Struct, frozen=True):
    """A new process. `seed` is for sampling, if the request names none."""

    pid: int
    request: Request
    seed: int


class Fork(Struct, frozen=True):
    """A new process that continues another one, sharing its pages, with a seed of its own.

    From where the parent is now, or from the end of its prompt: another sample of the same answer.
    """

    pid: int
    parent: int
    seed: int
    from_prompt: bool = False


class Restore(Struct, frozen=True):
    """A process of an earlier life, as the journal has it. It goes on where it was."""

    pid: int
    session: Session


class Forget(Struct, frozen=True):
    """The reader has the whole answer: the journal need not keep the session."""

    pid: int


class Kill(Struct, frozen=True):
    """End a process, whatever its state. Unknown pids are ignored: it may have just ended.

    Answered by Reply(ticket), if there is one. `keep` leaves a session in the journal, for the kernel's next life.
    """

    pid: int
    ticket: int | None = None
    keep: bool = False


class Renice(Struct, frozen=True):
    ticket: int
    pid: int
    nice: int


class Block(Struct, frozen=True):
    """Stop a process before its next token until Unblock: it waits for a tool. Answered by Reply(ticket) once it has
    stopped. `expected_s` is how long that will take, if known: it decides whether its KV stays, swaps or goes."""

    ticket: int
    pid: int
    expected_s: float | None = None


class Unblock(Struct, frozen=True):
    """Go on, with what the tool said as further tokens of the context. Answered by Reply(ticket)."""

    ticket: int
    pid: int
    tokens: tuple[int, ...] = ()


class Finish(Struct, frozen=True):
    """End a process that is held after its turn, as complete. Answered by Reply(ticket)."""

    ticket: int
    pid: int


class LoadModel(Struct, frozen=True):
    """Bring a model to the device now, to stay if `pin`, or only near it. Answered by Reply(ticket)."""

    ticket: int
    model: str
    prefetch: bool = False
    pin: bool = False


class Pin(Struct, frozen=True):
    """Keep a model on the device once it is there, or let it go again. Answered by Reply(ticket)."""

    ticket: int
    model: str
    pinned: bool


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
    """An operation ended: with its result (Opened, token ids, Compiled, rows or None), or with an error."""

    operation: int
    result: Any = None
    error: BaseException | None = None


Event = (
    Submit
    | Fork
    | Restore
    | Forget
    | Kill
    | Renice
    | Block
    | Unblock
    | Finish
    | LoadModel
    | UnloadModel
    | Pin
    | Halt
    | Completed
)

# -- actions ---------------------------------------------------------------------------------------------------------


class Open(Struct, frozen=True):
    """Open the image of a model by name; with `image`, look whether that one is still what the name stands for, and
    answer it again if so."""

    id: int
    model: str
    image: Image | None = None


class Encode(Struct, frozen=True):
    """Turn the request of process `pid` into token ids."""

    id: int
    image: Image
    request: Request
    pid: int = 0


class Compile(Struct, frozen=True):
    """Compile the grammar of a process's answer for the vocabulary of its model. The result is Compiled."""

    id: int
    model: str
    image: Image
    grammar: Grammar


class Load(Struct, frozen=True):
    id: int
    model: str
    image: Image
    placement: Placement


class Unload(Struct, frozen=True):
    """Weights and workspace go; KV stays."""

    id: int
    model: str


class Release(Struct, frozen=True):
    """The KV of a model that is not loaded goes too."""

    id: int
    model: str


class Prefetch(Struct, frozen=True):
    id: int
    model: str
    image: Image


class Run(Struct, frozen=True):
    id: int
    batch: Batch


class Copy(Struct, frozen=True):
    id: int
    model: str
    moves: tuple[Move, ...]


class SwapOut(Struct, frozen=True):
    """Store the contents of `pages` under `slots`, names that are never used twice. All of them, or an error."""

    id: int
    model: str
    pages: tuple[int, ...]
    slots: tuple[int, ...]
    tier: Tier


class SwapIn(Struct, frozen=True):
    """Bring the contents of `slots` into `pages`. The slots stay until they are discarded.

    The result is a tuple of bools: False for a slot whose contents are lost or not what was stored; nothing is written
    to its page.
    """

    id: int
    model: str
    slots: tuple[int, ...]
    pages: tuple[int, ...]


class Demote(Struct, frozen=True):
    """Move slots from host memory to disk. All of them, or an error and they stay where they are."""

    id: int
    model: str
    slots: tuple[int, ...]


class Discard(Struct, frozen=True):
    """Forget slots that nothing refers to. Has no completion."""

    slots: tuple[int, ...]


class Journal(Struct, frozen=True):
    """Make records durable, in order, after all records before them. What depends on them is delivered after this."""

    id: int
    records: tuple[Record, ...]


class Deliver(Struct, frozen=True):
    """A piece of an answer. The last one has either `completion` or `error`.

    `said` is on a fork's first one: what its parent had said before, which is part of the completion but not told to
    the reader. Filters have to know it.
    """

    pid: int
    chunk: Chunk | None = None
    completion: Completion | None = None
    error: Exception | None = None
    said: str = ""


class Reply(Struct, frozen=True):
    """The answer to an event with a ticket."""

    ticket: int
    error: Exception | None = None


class Close(Struct, frozen=True):
    """Release an image that nobody will use again. Has no completion."""

    image: Image


Operation = (
    Open | Encode | Compile | Load | Unload | Release | Prefetch | Run | Copy | SwapOut | SwapIn | Demote | Journal
)
Action = Operation | Discard | Deliver | Reply | Close
