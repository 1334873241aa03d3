"""Durable before delivered: what the host is told waits until the journal has what it depends on.

    said ──> waiting ──Journal──> flying ──Completed──> delivered        one Journal in flight at a time (group commit)

Without a journal, what is said is delivered at once. Knows no processes: pids, records and actions only.
"""

from __future__ import annotations

from llm_os.kernel import events as ev
from llm_os.kernel.errors import Error
from llm_os.kernel.flights import Flights
from llm_os.kernel.journal import Done, Record


class Outbox:
    """Orders deliveries behind their records."""

    def __init__(self, flights: Flights, journaled: bool) -> None:
        self._flights = flights
        self.journaled = journaled
        self._records: list[Record] = []
        self._waiting: list[ev.Deliver | ev.Reply] = []
        self._flying: list[ev.Deliver | ev.Reply] = []
        self._in_flight = False
        self._postponed = False  # writing has failed, and nothing that waits depends on what is left to write

    def __bool__(self) -> bool:
        """Whether something waits."""
        return bool((self._records and not self._postponed) or self._waiting or self._in_flight)

    def say(self, action: ev.Deliver | ev.Reply, *records: Record) -> None:
        """Deliver `action` once `records`, and all before them, are durable."""
        if not self.journaled:
            self._flights.emit(action)
            return
        self._records += records
        self._postponed = False
        if self._records or self._waiting or self._in_flight:
            self._waiting.append(action)
        else:
            self._flights.emit(action)

    def note(self, record: Record) -> None:
        """Write `record` down, soon."""
        if self.journaled:
            self._records.append(record)
            self._postponed = False

    def flush(self) -> None:
        """Start to write what waits, if nothing is being written."""
        if self._in_flight or self._postponed:
            return
        if self._records:
            self._flights.start(ev.Journal(self._flights.next_id(), tuple(self._records)))
            self._in_flight = True
            self._records, self._flying, self._waiting = [], self._waiting, []
        elif self._waiting:
            for action in self._waiting:
                self._flights.emit(action)
            self._waiting = []

    def written(self) -> None:
        """The records in flight are durable."""
        self._in_flight = False
        for action in self._flying:
            self._flights.emit(action)
        self._flying = []

    def failed(self, records: tuple[Record, ...], error: Error) -> set[int]:
        """The records in flight may be lost: whom they concern gets the error instead of what depended on them, and
        nothing after it. Returns their pids: such processes must end."""
        self._in_flight = False
        pids = {record.pid for record in records if not isinstance(record, Done)}
        delivers = [action for action in (*self._flying, *self._waiting) if isinstance(action, ev.Deliver)]
        ended = pids.intersection(action.pid for action in delivers if action.completion or action.error)
        for action in self._flying:
            if isinstance(action, ev.Reply):
                self._flights.emit(ev.Reply(action.ticket, action.error or error))
            elif action.pid not in pids:
                self._flights.emit(action)
        self._waiting = [a for a in self._waiting if not (isinstance(a, ev.Deliver) and a.pid in pids)]
        done = {pid: Done(pid) for pid in (*(r.pid for r in records if isinstance(r, Done)), *sorted(pids))}
        self._records = [*done.values(), *(record for record in self._records if record.pid not in done)]
        self._postponed = not self._waiting and all(isinstance(record, Done) for record in self._records)
        self._flying = []
        for pid in sorted(pids):
            self._flights.emit(ev.Deliver(pid, error=error))
        return pids - ended
