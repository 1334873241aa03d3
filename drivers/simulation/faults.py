"""Which faults there are, how often each comes, and which came. Knows nothing of what a fault does.

A place asks `Faults.at(place)` before it does its work, and gets the name of a fault or None. One choice is made for
all kinds that can happen there.
"""

from __future__ import annotations

from collections import Counter

from llm_os.drivers.simulation.chooser import Chooser
from llm_os.kernel.errors import RequestError

# kind -> how often it comes at each place where it can
RATES: dict[str, dict[str, float]] = {
    "allocation": {"load": 0.02, "run": 0.002, "copy": 0.1, "swap": 0.1, "unload": 0.01},
    "out_of_memory": {"load": 0.02, "run": 0.002},
    "step_error": {"run": 0.004},
    "wrong_rows": {"run": 0.001},
    "nan_row": {"run": 0.004},
    "hang": {"load": 0.01, "run": 0.002, "copy": 0.005, "swap": 0.01, "unload": 0.01, "journal": 0.002},
    "device_lost": {"run": 0.0003},
    "bit_flip": {"turn": 0.0015},
    "swap_flip": {"swapped": 0.05},
    "io_error": {"write": 0.004, "read": 0.004, "sync": 0.002},
    "disk_full": {"write": 0.004},
    "short_write": {"write": 0.01},
    "torn_write": {"write": 0.002, "lost": 0.3},
    "lost_sync": {"lost": 0.5},
    "disconnect": {"turn": 0.004},
    "double_cancel": {"turn": 0.003},
    "duplicate_id": {"turn": 0.003},
    "slow_reader": {"read whole": 0.2},
    "plugin_raise": {"open": 0.03, "encode": 0.02},
    "plugin_hang": {"open": 0.02, "encode": 0.02},
    "plugin_type": {"open": 0.03, "encode": 0.02},
    "file_changed": {"reopen": 0.3},
    "crash": {"step": 0.0015},
}
FAULTS = tuple(RATES)


def parse(text: str) -> tuple[str, ...]:
    """ "all", "none", or names with commas between them. Raises RequestError, naming the kinds there are."""
    if text in ("all", "none"):
        return FAULTS if text == "all" else ()
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in RATES]
    if unknown or not names:
        what = f"{unknown[0]!r} is no kind of fault" if unknown else "no kind of fault is named"
        raise RequestError(f"{what}; there are all, none, {', '.join(FAULTS)}")
    return tuple(name for name in FAULTS if name in names)


class Faults:
    """The faults of one run. `fail_call` makes the n-th call that can fail do so, once, beside all others."""

    def __init__(self, chooser: Chooser, kinds: tuple[str, ...], fail_call: int | None = None) -> None:
        self.hit: Counter[str] = Counter()
        self.calls = 0
        self._chooser = chooser
        self._fail_call = fail_call
        self._paused = False
        self._places: dict[str, tuple[list[str], list[float]]] = {}
        for kind in kinds:
            for place, rate in RATES[kind].items():
                names, bounds = self._places.setdefault(place, ([], []))
                names.append(kind)
                bounds.append(rate + (bounds[-1] if bounds else 0.0))
        self._kinds = kinds

    def stop(self) -> None:
        self._places = {}
        self._fail_call = None

    def at(self, place: str) -> str | None:
        """What goes wrong here, if anything. It counts as hit."""
        if self._paused or place not in self._places:
            return None
        names, bounds = self._places[place]
        which = self._chooser.which(bounds)
        if which == 0:
            return None
        self.hit[names[which - 1]] += 1
        return names[which - 1]

    def pause(self, paused: bool) -> None:
        self._paused = paused

    def can(self, kind: str) -> bool:
        return kind in self._kinds and bool(self._places)

    def call(self, place: str) -> str | None:
        """As `at`, for a call that can fail: it may be the one that has to."""
        self.calls += 1
        if self.calls == self._fail_call and not self._paused:
            self.hit["allocation"] += 1
            return "allocation"
        return self.at(place)
