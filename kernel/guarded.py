"""What plugins gave, as the kernel uses it: checked when it comes, and each call of it watched."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import get_annotations
from typing import Any, Literal

from llm_os.kernel.drafter import Draft, DraftContext, Drafter
from llm_os.kernel.errors import Error
from llm_os.kernel.filters import TextFilter
from llm_os.kernel.isolation import Guard, Health, Lane, told, within
from llm_os.kernel.policy import Candidate, Fair, Policy, Share

_SLOW_S = 0.002  # of a drafter, whose calls come between two batches
_log = logging.getLogger("llm_os.plugins")


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


class GuardedDrafter:
    """A plugin's drafter. What it says is a guess, so who asks hears of no failure: there are no guesses then. One that
    is slow on the average is asked no more."""

    def __init__(self, drafter: Drafter, health: Health, guard: Guard) -> None:
        self._drafter, self._health, self._guard = drafter, health, guard
        self._mean_s = 0.0  # of a call; the last 64 or so count
        self._off = False

    def open(self, context: DraftContext) -> Draft | None:
        if self._off:
            return None
        draft = self._guard.call(self._health, "Drafter.open", lambda: _draft(self._drafter.open(context)))
        return GuardedDraft(draft, self) if draft else None

    def guess(self, draft: Draft, new: Sequence[int], limit: int) -> tuple[int, ...] | None:
        """None where it fails, or is off."""
        if self._off:
            return None
        began = time.perf_counter()
        ids = self._guard.call(self._health, "Draft.guess", lambda: _ids(draft.guess(new, limit)))
        took = min(time.perf_counter() - began, 10 * _SLOW_S)  # one long break of the whole machine says nothing
        self._mean_s += (took - self._mean_s) / 64
        if self._mean_s > _SLOW_S:
            self._off = True
            name, millis = self._health.plugin, 1000 * _SLOW_S
            _log.error("plugin %r: Draft.guess takes more than %g ms on the average; it is asked no more", name, millis)
        return ids


class GuardedDraft:
    """One process's. The first failure is its last: nobody knows what it has noted by then."""

    def __init__(self, draft: Draft, drafter: GuardedDrafter) -> None:
        self._draft: Draft | None = draft
        self._drafter = drafter

    def guess(self, new: Sequence[int], limit: int) -> tuple[int, ...]:
        if self._draft is None:
            return ()
        ids = self._drafter.guess(self._draft, new, limit)
        if ids is None:
            self._draft = None
        return ids or ()


def _draft(given: Draft | None) -> Draft | Literal[False]:
    """Raises TypeError for what is none; False for None, which is no failure."""
    if given is not None and (why := lacks(given, Draft)) is not None:
        raise TypeError(f"it gave {why}")
    return given if given is not None else False


def _ids(given: object) -> tuple[int, ...]:
    """Raises TypeError."""
    if not isinstance(given, list | tuple) or any(type(token) is not int for token in given):
        raise TypeError("it gave no list or tuple of token ids")
    return tuple(given)


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
