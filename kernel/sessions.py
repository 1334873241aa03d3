"""Processes of an earlier life of the kernel: they go on from what the journal has of them.

    boot ──Restore──> NEW ──its model is opened──> takes again what it took ──> READY, or BLOCKED as it was

No text is encoded and no token computed for it: what it took is replayed, and its KV computed when it is its turn. What
is asked of it before it is there waits, in the order in which it was asked.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from llm_os.kernel import events as ev
from llm_os.kernel.errors import RequestError, as_error
from llm_os.kernel.flights import Flights
from llm_os.kernel.journal import Blocked
from llm_os.kernel.outbox import Outbox
from llm_os.kernel.process import Process, State

if TYPE_CHECKING:
    from llm_os.kernel.processes import Processes


class Sessions:
    """Those that are on their way back."""

    def __init__(self, table: Processes, flights: Flights, outbox: Outbox) -> None:
        self._table = table
        self._flights = flights
        self._outbox = outbox
        self._restoring: dict[int, ev.Restore] = {}
        self._early: dict[int, list[ev.Block | ev.Unblock | ev.Finish]] = {}

    def restore(self, event: ev.Restore) -> None:
        began = event.session.began
        process = Process(
            event.pid, began.request, began.seed, self._flights.now, nice=event.session.nice, restored=True
        )
        new = self._table.is_new(event.pid) or event.pid not in self._table.live  # they come at boot, in any order
        if new and self._table.enter(process):
            self._restoring[event.pid] = event
            self._table.begin(process)

    def begin(self, process: Process) -> bool:
        """Its image is there: let it go on, if it is of an earlier life."""
        if process.pid not in self._restoring:
            return False
        self._table.compiling.ensure(process, partial(self._go_on, process))
        return True

    def _go_on(self, process: Process) -> None:
        self._continue(process, self._restoring.pop(process.pid))
        self._catch_up(process.pid)

    def _continue(self, process: Process, event: ev.Restore) -> None:
        """Take again what it took."""
        session = event.session
        took = [record for record in session.since if not isinstance(record, Blocked)]
        try:
            process.admit(list(session.began.prompt))
            self._table.reserve(process)
            chunk = process.replay(took, self._flights.now)
            if given := sum(count for _, count in process.given):
                self._table.extend(process, given)
        except Exception as error:  # the model file may be another one now, or memory smaller: another life may do it
            self._table.fail(process, as_error(error, RequestError), keep=True)
            return
        if chunk is not None and chunk.finish_reason is not None:
            self._table.end(process, chunk.finish_reason, chunk, restored=True)
            return
        if chunk is not None:
            self._outbox.say(ev.Deliver(process.pid, chunk))
        self._table.ready(process)
        stopped = process.state is State.BLOCKED  # it is held, or was asked to while its model was being opened
        if not stopped and session.since and isinstance(session.since[-1], Blocked):
            self._table.pauses.stop(process)

    # -- what is asked too early -------------------------------------------------------------------------------------

    def defer(self, event: ev.Block | ev.Unblock | ev.Finish) -> bool:
        """Whether it has to wait until the process is there: a gift or an end, and all that comes after one."""
        early = event.pid in self._early or (not isinstance(event, ev.Block) and event.pid in self._restoring)
        if early:
            self._early.setdefault(event.pid, []).append(event)
        return early

    def _catch_up(self, pid: int) -> None:
        for event in self._early.pop(pid, ()):
            match event:
                case ev.Block():
                    self._table.pauses.block(event)
                case ev.Unblock():
                    self._table.pauses.unblock(event)
                case ev.Finish():
                    self._table.pauses.finish(event)

    def gone(self, pid: int) -> None:
        """It has ended: who asked for something is told so."""
        self._restoring.pop(pid, None)
        self._catch_up(pid)
