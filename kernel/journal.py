"""What a session leaves behind, so that it survives the death of the program: records, and the sessions they add up to.

    began ── took ── took ── given ── took ── … ── done

A record is durable before anything that depends on it is delivered. KV is not kept: it can be computed again. Nor is
any random state: the n-th number of a seed is a pure function (`kernel/random.py`). Knows no files: a `Log` writes.

Records are stored (msgpack: 8 bytes a token), so tags and the order of fields stay; new fields go to the end and have
a default.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec import Struct, msgpack

from llm_os.kernel.errors import RequestError
from llm_os.kernel.request import Request


class Began(Struct, frozen=True, array_like=True, tag=0):
    """A process was admitted with these prompt tokens."""

    pid: int
    request: Request
    seed: int
    prompt: tuple[int, ...]


class Took(Struct, frozen=True, array_like=True, tag=1):
    """It generated tokens, each with (token id, log-probability, alternatives)."""

    pid: int
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()  # as many as tokens, or none


class Given(Struct, frozen=True, array_like=True, tag=2):
    """It was given tokens while it was blocked."""

    pid: int
    tokens: tuple[int, ...]


class Done(Struct, frozen=True, array_like=True, tag=3):
    """It ended; nobody needs it any more."""

    pid: int


class Blocked(Struct, frozen=True, array_like=True, tag=4):
    """It stopped, until it is given something."""

    pid: int


class Reniced(Struct, frozen=True, array_like=True, tag=5):
    """Its class is another one than its request says."""

    pid: int
    nice: int


Record = Began | Took | Given | Done | Blocked | Reniced


class Session(Struct, frozen=True):
    """A process that had not ended: how it began, and what it took and was given, in order."""

    began: Began
    since: tuple[Took | Given | Blocked, ...] = ()
    reniced: Reniced | None = None

    @property
    def nice(self) -> int:
        return self.began.request.nice if self.reniced is None else self.reniced.nice

    @property
    def records(self) -> tuple[Record, ...]:
        """What it adds up from."""
        return (self.began, *(() if self.reniced is None else (self.reniced,)), *self.since)


class Log(Protocol):
    """Where records go. One writer, one call at a time."""

    sessions: dict[int, Session]  # those that had not ended when it was opened
    last_pid: int  # the greatest that it has ever seen
    warning: str  # what was not as it should be when it was opened, for the host's log; "" if all was well

    def append(self, records: Sequence[Record]) -> None:
        """Returns once the records are durable. Raises StoreError if they may not be; they are then not in the log."""
        ...

    def close(self) -> None: ...


def check_storable(request: Request) -> None:
    """Raises RequestError for a request that could not be read back from a journal: it may hold anything. Asked at the
    door, because records are written in groups: one that cannot be written fails its neighbours."""
    try:
        msgpack.decode(msgpack.encode(request), type=Request)
    except Exception as error:  # of msgspec, of the fields' own checks, too deep, no text
        raise RequestError(f"the request cannot be journaled: {error}; give plain text and numbers") from error


def replay(records: Iterable[Record]) -> dict[int, Session]:
    """The sessions that had not ended, by pid. Records of a pid that never began are passed over."""
    began: dict[int, Began] = {}
    since: dict[int, list[Took | Given | Blocked]] = {}
    reniced: dict[int, Reniced] = {}
    for record in records:
        match record:
            case Began(pid):
                began[pid], since[pid] = record, []
                reniced.pop(pid, None)
            case Took(pid) | Given(pid) | Blocked(pid) if pid in began:
                since[pid].append(record)
            case Reniced(pid) if pid in began:
                reniced[pid] = record
            case Done(pid):
                began.pop(pid, None)
                since.pop(pid, None)
    return {pid: Session(start, tuple(since[pid]), reniced.get(pid)) for pid, start in began.items()}
