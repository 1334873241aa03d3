"""Processes whose grammar is being compiled: neither ready nor restored before that. Knows no grammar.

encoded, or of an earlier life ──Compile──> its grammar is there ──> goes on; a fork takes that of its parent
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llm_os.kernel import events as ev
from llm_os.kernel.constraint import Compiled
from llm_os.kernel.errors import PluginError, as_error
from llm_os.kernel.flights import Flights
from llm_os.kernel.process import Process, State

if TYPE_CHECKING:
    from llm_os.kernel.processes import Processes


class Compiling:
    """Those that wait for it."""

    def __init__(self, table: Processes, flights: Flights) -> None:
        self._table = table
        self._flights = flights
        self._next: dict[int, Callable[[], None]] = {}  # what to do when it is there, by pid

    def ensure(self, process: Process, then: Callable[[], None]) -> None:
        """Go on at once, or when the grammar has been compiled; never, if that fails."""
        grammar = process.request.sampling.grammar
        if grammar is None or process.compiled is not None:
            then()
            return
        assert process.image is not None
        self._next[process.pid] = then
        operation = ev.Compile(self._flights.next_id(), process.request.model, process.image, grammar)
        self._flights.start(operation, (process,))

    def compiled(self, process: Process, event: ev.Completed) -> None:
        then = self._next.pop(process.pid)
        if process.state is State.ENDED:
            return
        if event.error is not None:  # in another life it may be possible: with the plugin that compiles it, say
            self._table.fail(process, as_error(event.error, PluginError), keep=process.restored)
            return
        assert isinstance(event.result, Compiled)
        process.compiled = event.result
        then()
