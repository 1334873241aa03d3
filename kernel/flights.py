"""Operations in flight, and the pages that each one names: the fence that keeps a page from being reused too early."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from llm_os.kernel import events as ev
from llm_os.kernel.memory import Slab
from llm_os.kernel.process import Process


class Flight(Struct, frozen=True):
    """One operation, whom it concerns, and the pages that it holds a reference to."""

    operation: ev.Operation
    processes: tuple[Process, ...] = ()
    slab: Slab | None = None
    pages: tuple[int, ...] = ()


class Flights:
    """Starts operations and lands them; collects the actions of a step."""

    def __init__(self) -> None:
        self._flying: dict[int, Flight] = {}
        self._count = 0
        self._actions: list[ev.Action] = []

    def __len__(self) -> int:
        return len(self._flying)

    def next_id(self) -> int:
        self._count += 1
        return self._count

    def start(
        self,
        operation: ev.Operation,
        processes: tuple[Process, ...] = (),
        slab: Slab | None = None,
        pages: tuple[int, ...] = (),
    ) -> None:
        """Emit an operation. The references to `pages`, already counted, pass to the flight."""
        self._flying[operation.id] = Flight(operation, processes, slab, pages)
        self.emit(operation)

    def land(self, operation: int) -> Flight:
        """The operation has completed: its pages are released."""
        flight = self._flying.pop(operation)
        if flight.slab is not None:
            flight.slab.release(flight.pages)
        return flight

    def emit(self, action: ev.Action) -> None:
        self._actions.append(action)

    def drain(self) -> list[ev.Action]:
        actions, self._actions = self._actions, []
        return actions

    @property
    def running(self) -> bool:
        """Whether a batch is in flight."""
        return any(isinstance(flight.operation, ev.Run) for flight in self._flying.values())

    @property
    def hold_pages(self) -> bool:
        return any(flight.pages for flight in self._flying.values())

    @property
    def models(self) -> set[str]:
        """Models that an operation in flight concerns."""
        return {_model_of(flight.operation) for flight in self._flying.values()}

    def check(self, references: dict[str, Counter[int]]) -> None:
        """No page that a batch writes is mapped twice. Adds the flights' own pages to `references` of the tables."""
        for flight in self._flying.values():
            if isinstance(flight.operation, ev.Run) and flight.slab is not None:
                batch = flight.operation.batch
                mapped = references.get(batch.model, Counter())
                for rows in batch.sequences:
                    for page in rows.pages[rows.position // flight.slab.page_tokens :]:
                        assert mapped[page] <= 1, "a shared page is being written"
        for flight in self._flying.values():
            if flight.pages:
                references.setdefault(_model_of(flight.operation), Counter()).update(flight.pages)


def _model_of(operation: ev.Operation) -> str:
    match operation:
        case ev.Run():
            return operation.batch.model
        case ev.Encode():
            return operation.request.model
        case _:
            return operation.model
