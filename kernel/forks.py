"""Processes that continue another one: from where it is, or from the end of its prompt, with a seed of their own.

    parent  prompt prompt prompt | answer an…            pages are shared until one of them writes (copy on write)
    fork    ─────────── shared ───────────── | swer      a child begins when no operation in flight names its parent
    sample  ────── shared ────── | other                 or when the parent's prompt is computed

What the child is, the process table knows as of any other process; its journal begins with what its parent had said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_os.kernel import events as ev
from llm_os.kernel.errors import RequestError, as_error
from llm_os.kernel.flights import Flights
from llm_os.kernel.journal import Given, Took
from llm_os.kernel.outbox import Outbox
from llm_os.kernel.page_table import PageTable
from llm_os.kernel.process import Process, State

if TYPE_CHECKING:
    from llm_os.kernel.processes import Processes


class Forks:
    """The beginnings of children."""

    def __init__(self, table: Processes, flights: Flights, outbox: Outbox) -> None:
        self._table = table
        self._flights = flights
        self._outbox = outbox

    def fork(self, event: ev.Fork) -> None:
        if not self._table.is_new(event.pid):
            return
        parent = self._table.live.get(event.parent)
        if parent is None or (parent.table is None and not event.from_prompt):
            missing = f"process {event.parent} has ended or has not started; only a running process can fork"
            self._flights.emit(ev.Deliver(event.pid, error=RequestError(missing)))
            return
        child = Process(event.pid, parent.request, event.seed, self._flights.now, parent.pid, parent.nice)
        child.from_prompt = event.from_prompt
        if self._table.enter(child):
            parent.forks.append(child)
            self.begin(parent)

    def begin(self, parent: Process) -> None:
        """Let children begin that waited for this process to stand still, or for its prompt to be computed."""
        if not parent.forks or parent.flights or parent.state is State.NEW:
            return
        children, parent.forks = parent.forks, []
        for child in children:
            if child.state is State.ENDED:
                continue
            over = parent.state is State.ENDED
            if child.from_prompt and not over and parent.computed < parent.prompt_tokens:
                parent.forks.append(child)
            elif parent.image is None or not parent.tokens or (over and not child.from_prompt):
                self._table.fail(child, RequestError(f"process {parent.pid} ended before it could be forked"))
            else:
                self._share(parent, child)

    def _share(self, parent: Process, child: Process) -> None:
        """The child begins with what the parent has."""
        child.image, child.compiled = parent.image, parent.compiled
        history: list[Took | Given] = []
        try:
            child.admit(parent.tokens[: parent.prompt_tokens])
            if not child.from_prompt:
                history = parent.history()
                child.replay(history, self._flights.now)
                child.said = "".join(child.text)
            self._table.reserve(child)
        except Exception as error:  # no quota, or a plugin's code
            self._table.fail(child, as_error(error, RequestError))
            return
        self._table.note_beginning(child)
        for record in history:
            if isinstance(record, Took):
                self._outbox.note(Took(child.pid, record.tokens, record.logprobs))
            else:
                self._outbox.note(Given(child.pid, record.tokens))
        if parent.table is not None and parent.state is not State.ENDED:
            table = child.table = PageTable(parent.table.slab)
            child.computed = min(parent.computed, len(child.tokens) - 1)
            for page in parent.table.pages[: table.slab.pages_for(child.computed)]:
                table.add(page)
            table.keys = parent.table.keys[: child.computed // table.slab.page_tokens]
            child.charged = child.paid = child.computed
            child.cached = min(child.computed, child.prompt_tokens)
        self._table.ready(child)
