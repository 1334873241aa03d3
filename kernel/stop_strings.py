"""Finds stop strings in streamed text, holding back only what could still become one."""

from __future__ import annotations


class StopStrings:
    """One process's scanner. Feed text with `push`; after `hit`, nothing more comes out."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Text that is certainly not part of a stop string."""
        if not self._stops:
            return text
        held = self._held + text
        found = min((at for stop in self._stops if (at := held.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.hit, self._held = True, ""
            return held[:found]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
