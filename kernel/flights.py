"""Operations in flight, whom and what each names: the fence that keeps a page where it is until it has landed.

A process in flight keeps its page table, even if it has ended meanwhile, so no page of a batch is freed under it. A
copy or swap also holds the pages that it names, and marks them busy: they are neither moved nor written until then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from msgspec import Struct

from llm_os.kernel import events as ev
from llm_os.kernel.process import Process
from llm_os.kernel.slab import Page


class Flight(Struct, frozen=True):
    """One operation, since when it flies, whom it concerns, and the pages that it holds."""

    operation: ev.Operation
    started: float
    processes: tuple[Process, ...] = ()
    pages: tuple[Page, ...] = ()
    places: tuple[int, ...] = ()  # of a move: where each page will be


class Flights:
    """Starts operations and lands them; collects the actions of a step."""

    def __init__(self) -> None:
        self.now = 0.0
        self._flying: dict[int, Flight] = {}
        self._kinds: Counter[type] = Counter()
        self._models: Counter[str] = Counter()
        self._busy: Counter[str] = Counter()
        self._last = 0
        self._actions: list[ev.Action] = []

    def __len__(self) -> int:
        return len(self._flying)

    def next_id(self) -> int:
        self._last += 1
        return self._last

    def start(
        self,
        operation: ev.Operation,
        processes: tuple[Process, ...] = (),
        pages: tuple[Page, ...] = (),
        places: tuple[int, ...] = (),
    ) -> None:
        self._flying[operation.id] = Flight(operation, self.now, processes, pages, places)
        self._kinds[type(operation)] += 1
        self._models[_model_of(operation)] += 1
        if isinstance(operation, _BUSY):
            self._busy[_model_of(operation)] += 1
        for process in processes:
            process.flights += 1
        for page in pages:
            page.slab.hold(page)
            page.busy += 1
        self.emit(operation)

    def land(self, operation: int) -> Flight | None:
        """The operation has completed. Its pages are still held: the caller lets go of them. None if it had already."""
        flight = self._flying.pop(operation, None)
        if flight is None:
            return None
        self._kinds[type(flight.operation)] -= 1
        model = _model_of(flight.operation)
        self._models[model] -= 1
        if isinstance(flight.operation, _BUSY):
            self._busy[model] -= 1
        if not self._models[model]:
            del self._models[model], self._busy[model]
        for process in flight.processes:
            process.flights -= 1
        for page in flight.pages:
            page.busy -= 1
        return flight

    def emit(self, action: ev.Action) -> None:
        self._actions.append(action)

    def drain(self) -> list[ev.Action]:
        actions, self._actions = self._actions, []
        return actions

    def flying(self, *kinds: type) -> bool:
        """Whether an operation of one of these kinds is in flight."""
        return any(map(self._kinds.get, kinds))

    def concern(self, model: str) -> bool:
        """Whether an operation in flight names the model."""
        return model in self._models

    def busy(self, model: str) -> bool:
        """Whether an operation in flight needs the model's weights where they are, or moves them."""
        return self._busy.get(model, 0) > 0

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flying.values())


_BUSY = (ev.Run, ev.Load, ev.Unload, ev.Release)


def _model_of(operation: ev.Operation) -> str:
    match operation:
        case ev.Run():
            return operation.batch.model
        case ev.Encode():
            return operation.request.model
        case ev.Journal():
            return ""
        case _:
            return operation.model
