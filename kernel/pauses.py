"""Processes that stop for a while: for a tool that was asked to say something, or for the next turn of a chat.

    READY ──block, or its turn is over (hold)──> BLOCKED ──unblock, with what was said──> READY
                                                    └────finish────> ended, its answer is whole

Their pages stay until somebody needs the room. Whoever asks is answered when what was asked for is durable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_os.kernel import events as ev
from llm_os.kernel.errors import Error, RequestError
from llm_os.kernel.flights import Flights
from llm_os.kernel.journal import Blocked, Given
from llm_os.kernel.outbox import Outbox
from llm_os.kernel.process import Process, State
from llm_os.kernel.residency import Residency
from llm_os.kernel.scheduler import Scheduler

if TYPE_CHECKING:
    from llm_os.kernel.processes import Processes


class Pauses:
    """Those who stop, and go on."""

    def __init__(
        self, table: Processes, flights: Flights, outbox: Outbox, residency: Residency, scheduler: Scheduler
    ) -> None:
        self._table = table
        self._flights = flights
        self._outbox = outbox
        self._residency = residency
        self._scheduler = scheduler

    def block(self, event: ev.Block) -> None:
        if self._table.sessions.defer(event):
            return
        process = self._table.live.get(event.pid)
        if process is None:
            self._reply(event.ticket, RequestError(f"there is no process {event.pid}"))
        elif process.blocking is not None or (process.state is State.BLOCKED and not process.holding):
            self._reply(event.ticket, RequestError(f"process {event.pid} is blocked already"))
        else:
            process.resumes = None if event.expected_s is None else self._flights.now + event.expected_s
            if process.state is State.BLOCKED:
                self._outbox.say(ev.Reply(event.ticket))
            else:
                process.blocking = event.ticket
                self.stop_if_asked(process)

    def stop_if_asked(self, process: Process) -> None:
        """Block it, if that was asked for and no batch is computing its next token."""
        if process.blocking is not None and process.state is State.READY:
            ticket, process.blocking = process.blocking, None
            self.stop(process)
            self._outbox.say(ev.Reply(ticket), Blocked(process.pid))

    def hold(self, process: Process) -> None:
        """Its turn is over: it waits for what comes next, as whoever has asked it to stop is told too."""
        self.stop(process)
        if process.blocking is not None:
            ticket, process.blocking = process.blocking, None
            self._outbox.say(ev.Reply(ticket))

    def stop(self, process: Process) -> None:
        process.state = State.BLOCKED
        self._scheduler.withdraw(process)
        self._residency.models[process.request.model].blocked += 1
        process.guesser = None  # what it remembers may be megabytes; it is told all again

    def unblock(self, event: ev.Unblock) -> None:
        if self._table.sessions.defer(event):
            return
        process = self._table.live.get(event.pid)
        try:
            if process is None:
                raise RequestError(f"there is no process {event.pid}")
            if process.state is not State.BLOCKED:
                raise RequestError(f"process {event.pid} is not blocked")
            process.check_gift(event.tokens)
            self._table.extend(process, len(event.tokens), ahead=len(event.tokens))
        except Error as error:
            self._reply(event.ticket, error)
            return
        process.give(event.tokens)
        process.state, process.resumes = State.READY, None
        self._residency.models[process.request.model].blocked -= 1
        self._scheduler.enqueue(process, self._flights.now)
        self._outbox.say(ev.Reply(event.ticket), Given(process.pid, event.tokens))

    def finish(self, event: ev.Finish) -> None:
        if self._table.sessions.defer(event):
            return
        process = self._table.live.get(event.pid)
        if process is None:
            self._reply(event.ticket, RequestError(f"there is no process {event.pid}"))
        elif not process.holding:
            error = f"process {event.pid} is not held at the end of a turn (Request.hold); kill ends any process"
            self._reply(event.ticket, RequestError(error))
        else:
            self._table.end(process, "stop")
            self._outbox.say(ev.Reply(event.ticket))

    def gone(self, process: Process) -> None:
        """It has ended: who asked it to stop is told so."""
        if process.blocking is not None:
            self._reply(process.blocking, RequestError(f"process {process.pid} ended before it could be blocked"))
            process.blocking = None

    def _reply(self, ticket: int, error: Exception | None = None) -> None:
        self._flights.emit(ev.Reply(ticket, error))
