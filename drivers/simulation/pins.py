"""Who was told that a model stays on the device. Sees tickets, failures and what must go; knows no processes."""

from __future__ import annotations

from collections.abc import Collection

from llm_os.drivers.simulation.violation import insist
from llm_os.kernel import events as ev


class Pins:
    """Of one life. A pin holds from its reply until it is taken back, the model is to be unloaded, or cannot be had:
    whoever waits for a model that fails is told so, and its pin goes with it."""

    def __init__(self) -> None:
        self.ever = False  # whether anybody has pinned anything
        self._pinned: set[str] = set()
        self._pins: dict[int, str] = {}  # tickets
        self._unloads: dict[int, str] = {}
        self._loads: dict[int, str] = {}

    def asked(self, event: ev.Event) -> None:
        match event:
            case ev.Pin(ticket, model, True):
                self.ever = True
                if model not in self._unloads.values():
                    self._pins[ticket] = model
            case ev.LoadModel(ticket, model, prefetch, pin):
                self.ever |= pin
                self._loads[ticket] = model
                if pin and not prefetch and model not in self._unloads.values():
                    self._pins[ticket] = model
            case ev.Pin(_, model, False):
                self._unpin(model)
            case ev.UnloadModel(ticket, model):
                self._unpin(model)
                self._unloads[ticket] = model

    def replied(self, item: ev.Reply) -> None:
        self._unloads.pop(item.ticket, None)
        pinned, loaded = self._pins.pop(item.ticket, None), self._loads.pop(item.ticket, None)
        if item.error is None and pinned is not None:
            self._pinned.add(pinned)
        elif item.error is not None and loaded is not None:
            self._unpin(loaded)

    def failed(self, operation: ev.Operation, ready: Collection[str]) -> None:
        """`ready` are the models on the device: others may have waited for pages to move out of the way."""
        match operation:
            case ev.Open() | ev.Load() | ev.Release():
                self._unpin(operation.model)
            case ev.Copy():
                for model in {*self._pinned, *self._pins.values()} - {*ready}:
                    self._unpin(model)

    def refused(self, model: str, error: Exception) -> None:
        """A process of this model ends with this error: maybe the model does not fit beside others that are pinned."""
        if "unpin" in str(error):
            self._unpin(model)

    def unload(self, operation: ev.Unload) -> None:
        """A model has to go. Nobody who pinned it was told that it would stay."""
        insist(operation.model not in self._pinned, "pin", f"{operation.model} is unloaded")

    def _unpin(self, model: str) -> None:
        self._pinned.discard(model)
        self._pins = {ticket: name for ticket, name in self._pins.items() if name != model}
