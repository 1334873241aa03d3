"""What happened in a run: a hash of it, and, if somebody wants to read it, the story in words. Judges nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from llm_os.kernel import events as ev

_WIDTH = 400


class Trace:
    """Of all steps, in order."""

    def __init__(self, tell: bool) -> None:
        self.story: list[str] = []
        self._tell = tell
        self._hash = hashlib.blake2b(digest_size=8)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def events(self, step: int, clock: int, events: Sequence[ev.Event]) -> None:
        self._hash.update(b"%d %d %d" % (step, clock, len(events)))
        if self._tell:
            self.story += [f"{step} at {clock} <- {event}"[:_WIDTH] for event in events]

    def actions(self, step: int, actions: Sequence[ev.Action]) -> None:
        self._hash.update(repr([_gist(action) for action in actions]).encode() if actions else b"[]")
        if self._tell:
            self.story += [f"{step} -> {action}"[:_WIDTH] for action in actions]


def _gist(action: ev.Action) -> object:
    match action:
        case ev.Run(id, batch):
            return (
                id,
                batch.model,
                [(row.pid, row.position, row.end - row.position, row.pages) for row in batch.sequences],
            )
        case ev.Deliver(pid, chunk, completion, error):
            return pid, chunk and chunk.token_ids, completion is None, error is None
        case ev.Discard(slots):
            return slots
        case ev.Reply(ticket, error):
            return ticket, error is None
        case ev.Close():
            return None
        case _:
            return type(action).__name__, action.id
