"""What plugins gave, as the kernel uses it: checked when it comes, and each call of it watched."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from inspect import get_annotations
from typing import Any

from llm_os.kernel.errors import Error
from llm_os.kernel.filters import TextFilter
from llm_os.kernel.isolation import Guard, Health, Lane, told, within
from llm_os.kernel.policy import Candidate, Fair, Policy, Share


class Filtering:
    """One filter of one answer, called in its plugin's lane."""

    def __init__(self, lane: Lane, text: TextFilter) -> None:
        self._lane = lane
        self._text = text

    def push(self, text: str) -> str:
        return str(self._lane.call("TextFilter.push", str, lambda: self._text.push(text)))

    def flush(self) -> str:
        return str(self._lane.call("TextFilter.flush", str, lambda: self._text.flush()))


class GuardedPolicy:
    """A plugin's policy; Fair where that fails."""

    def __init__(self, policy: Policy, health: Health, guard: Guard) -> None:
        self._policy, self._health, self._guard, self._fair = policy, health, guard, Fair()

    def share(self, share: Share) -> float:
        value = self._guard.call(self._health, "Policy.share", lambda: _number(self._policy.share(share)))
        return self._fair.share(share) if value is None else value

    def rank(self, candidate: Candidate) -> float:
        value = self._guard.call(self._health, "Policy.rank", lambda: _number(self._policy.rank(candidate)))
        return 0.0 if value is None else value


def _number(value: object) -> float:
    """A plain one. Raises TypeError or ValueError, and what a number of a plugin's own kind may raise."""
    if not isinstance(value, int | float):
        raise TypeError(f"it gave {type(value).__name__}, no number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"it gave {number}")
    return number


def lacks(given: object, kind: type) -> str | None:
    """What it would need to be of the protocol `kind`, told after "gave" or "takes"; None if it has it all."""
    members = (name for name in (*vars(kind), *get_annotations(kind)) if not name.startswith("_"))
    missing = next((name for name in members if not hasattr(given, name)), None)
    return f"{type(given).__name__}, no {kind.__name__}: it has no {missing}" if missing else None


def opened(health: Health, hook: str, kind: type, call: Callable[[], Any], limit_s: float | None) -> Any:
    """What `call` opens, of the protocol `kind`, or None. Raises PluginError, and an Error of ours as it is."""
    try:
        given = call() if limit_s is None else within(limit_s, call, _discard)
    except Error:
        raise
    except Exception as error:
        raise health.failed(hook, f"raised {told(error)}") from error
    if given is not None and (why := lacks(given, kind)) is not None:
        raise health.failed(hook, f"gave {why}")
    health.well(hook)
    return given


def _discard(late: Any) -> None:
    """What came when nobody waited for it any more."""
    with suppress(Exception):  # it may be anything
        late.close()
