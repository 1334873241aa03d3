"""What things take, learnt from what they took: the base of every choice between two ways. Seconds, bytes, tokens.

Each figure starts as a guess for a plain machine and follows what is measured (an exponential moving average), by the
core's own clock, so the same events give the same choices.
"""

from __future__ import annotations

from itertools import pairwise

from llm_os.kernel.events import Tier

_SHARE = 0.25  # of the newest measurement
_LARGE = 2**20  # bytes of a swap that takes much longer than to begin one


class Costs:
    """Rates of one device."""

    def __init__(self) -> None:
        self._load = 2e-9  # seconds a byte of weights
        self._compute = 7e-12  # seconds a byte of weights, times a token of a prompt
        self._begin: dict[Tier, float] = {"host": 0.0, "disk": 0.0}  # seconds a swap, whatever its size
        self._swap: dict[Tier, float] = {"host": 5e-10, "disk": 2.5e-9}  # seconds a byte

    def load_s(self, weights: int) -> float:
        return weights * self._load

    def compute_s(self, weights: int, tokens: int) -> float:
        return weights * tokens * self._compute

    def swap_s(self, size: int, tier: Tier) -> float:
        """One way."""
        return self._begin[tier] + size * self._swap[tier]

    def loaded(self, weights: int, seconds: float) -> None:
        self._load = _follow(self._load, weights, seconds)

    def computed(self, weights: int, tokens: int, seconds: float) -> None:
        """A batch of so many tokens. Small ones say nothing: the weights are read for one token as for sixteen."""
        if tokens >= 16:
            self._compute = _follow(self._compute, weights * tokens, seconds)

    def swapped(self, size: int, tier: Tier, seconds: float) -> None:
        """One way. A small one says what it takes to begin, a large one what a byte takes."""
        if seconds <= 0:
            return
        if size < _LARGE:
            beginning = max(0.0, seconds - size * self._swap[tier])
            self._begin[tier] += _SHARE * (beginning - self._begin[tier])
        else:
            self._swap[tier] = _follow(self._swap[tier], size, max(0.0, seconds - self._begin[tier]))


class BatchTimes:
    """What the batches of one model take, by their rows, of those in which every row chooses a token.

    More rows than were measured lately are guessed: from what added rows took so far, at least nearly nothing and at
    most in proportion. What disturbs a measurement makes it longer: one that was made once or twice is believed in
    part, and what is older than FRESH batches is measured again, so that one slow moment decides nothing for ever.
    """

    FRESH = 128

    def __init__(self) -> None:
        self._measured: dict[int, tuple[float, int, int]] = {}  # by rows: seconds, how often, when last, in batches
        self._batches = 0

    def measured(self, rows: int, seconds: float) -> None:
        if seconds <= 0:
            return
        self._batches += 1
        rows = _rounded(rows)
        before, count, at = self._measured.get(rows, (seconds, 0, 0))
        if self._batches - at > self.FRESH:
            before, count = seconds, 0
        share = 0.5 if seconds < before else 0.125
        self._measured[rows] = before + share * (min(seconds, 2 * before) - before), count + 1, self._batches

    def curve(self, rows: int, more: int) -> list[float] | None:
        """Seconds of a batch of so many rows, of one more, and so on. None while its own have not been measured."""
        first, oldest = _rounded(rows), self._batches - self.FRESH
        known = sorted(
            (n, taken, count) for n, (taken, count, at) in self._measured.items() if n >= first and at >= oldest
        )
        if not known or known[0][0] != first:
            return None
        base = known[0][1]
        points = [(rows, base), *((n, taken - 0.3 * taken / count) for n, taken, count in known[1:])]
        below = max((n for n in self._measured if n < first), default=0)
        slope = (base - self._measured[below][0]) / (rows - below) if below else 0.05 * base
        times: list[float] = []
        for (left, low), (right, high) in pairwise(points):
            low = max([low, *times[-1:]])
            rise = max(0.0, high - low) / (right - left)
            times += [low + rise * n for n in range(right - left)]
        last, taken = points[-1][0], max([points[-1][1], *times[-1:]])
        if last > rows:
            slope = (taken - base) / (last - rows)
        slope = min(max(slope, 0.02 * taken / last), taken / last)
        times += [taken + slope * n for n in range(rows + more + 1 - last)]
        return times[: more + 1]


def _rounded(rows: int) -> int:
    """To four bits: each number up to 15, then every second, every fourth, …"""
    shift = max(0, rows.bit_length() - 4)
    return rows >> shift << shift


def _follow(rate: float, amount: int, seconds: float) -> float:
    if seconds <= 0 or not amount:
        return rate
    return rate + _SHARE * (seconds / amount - rate)
