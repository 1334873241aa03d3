"""Threads that call the same compiled function at the same time. Knows no program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


class Team:
    """The caller's thread and `count - 1` others, which wait for work without using the processor."""

    def __init__(self, count: int, name: str) -> None:
        self._others = count - 1
        self._pool = ThreadPoolExecutor(self._others, name) if self._others else None

    def map(self, function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
        """The results in order, of as many calls at a time as there are threads. Raises what one of them raises."""
        with ThreadPoolExecutor(self._others + 1) as pool:
            return list(pool.map(function, items))

    def run(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Returns when all have come back. The function must not need them all: a thread may come late."""
        if self._pool is None:
            function(*arguments)
            return
        others = [self._pool.submit(function, *arguments) for _ in range(self._others)]
        function(*arguments)
        for other in others:
            if not other.cancel():
                other.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
