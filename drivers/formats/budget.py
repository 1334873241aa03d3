"""What work on values costs, and a budget for it that no clock decides. Knows nothing of templates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

CHARACTERS = 64  # that one unit pays for


class Spent(Exception):
    """The budget is used up, or one value is larger than any budget."""


class Budget:
    """Units of work that one rendering may still do."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.left = units

    def spend(self, units: int) -> None:
        """Raises Spent."""
        self.left -= units
        if self.left < 0:
            raise Spent(f"it takes more than its {self.units} steps")

    def each(self, values: Iterator[Any]) -> Iterator[Any]:
        """`values`, each for one unit."""
        for value in values:
            self.spend(1)
            yield value

    def spend_deep(self, *values: Any) -> None:
        """Pay for everything inside, counted again at each place where it appears: printing or comparing goes there."""
        stack = list(values)
        while stack:
            value = stack.pop()
            self.spend(breadth(value))
            if isinstance(value, Mapping):
                stack.extend(value.keys())
                stack.extend(value.values())
            elif isinstance(value, Iterable) and not isinstance(value, (str, range, Iterator)):
                stack.extend(value)


def breadth(value: Any) -> int:
    """Units for touching a value, not what is inside it."""
    if isinstance(value, str):
        return 1 + len(value) // CHARACTERS
    try:
        return 1 + len(value)
    except (TypeError, AttributeError):
        return 1
