"""What things take, learnt from what they took: the base of every choice between two ways. Seconds, bytes, tokens.

Each figure starts as a guess for a plain machine and follows what is measured (an exponential moving average), by the
core's own clock, so the same events give the same choices.
"""

from __future__ import annotations

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


def _follow(rate: float, amount: int, seconds: float) -> float:
    if seconds <= 0 or not amount:
        return rate
    return rate + _SHARE * (seconds / amount - rate)
