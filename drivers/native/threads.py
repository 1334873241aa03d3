"""Threads that call the same compiled function at the same time. Knows no program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar, cast

_T = TypeVar("_T")
_R = TypeVar("_R")


class _Call:
    """What one of the others is asked to do, unless it comes too late."""

    __slots__ = ("arguments", "begun", "ended", "function")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments
        self.begun, self.ended = Lock(), Lock()  # taken when it begins, or when nobody needs it any more
        self.ended.acquire()

    def perform(self) -> None:
        if self.begun.acquire(blocking=False):
            try:
                self.function(*self.arguments)
            finally:
                self._forget()
                self.ended.release()

    def wait(self) -> None:
        """Until it has come back, if it has begun; else it never will."""
        if self.begun.acquire(blocking=False):
            self._forget()
        else:
            self.ended.acquire()

    def _forget(self) -> None:
        """An idle thread may have this call in its hands for long: it must not hold a model."""
        self.function, self.arguments = int, ()


class Team:
    """The caller's thread and `count - 1` others, which wait for work without using the processor."""

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._others = [Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(1, count)]
        for thread in self._others:
            thread.start()

    def map(self, function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """The results in order, of as many calls at a time as there are threads. Raises what one of them raises."""
        results: list[Future[_R]] = [Future() for _ in items]
        left = iter(zip(items, results, strict=True))
        taking = Lock()

        def work(_: int) -> None:
            while True:
                with taking:
                    item, result = next(left, (None, None))
                if result is None:
                    return
                try:
                    result.set_result(function(cast(_T, item)))
                except BaseException as error:
                    result.set_exception(error)
                    del error

        self.run(work)
        return [result.result() for result in results]

    def run(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call it in every thread, with the thread's number after `arguments`. Returns when all have come back.

        The function must not need them all: a thread may come late, or never. It must not raise: compiled code does
        not."""
        calls = [_Call(function, (*arguments, number)) for number in range(1, self.count)]
        for call in calls:
            self._calls.put(call)
        function(*arguments, 0)
        for call in calls:
            call.wait()

    def close(self) -> None:
        for _ in self._others:
            self._calls.put(None)
        for thread in self._others:
            thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call.perform()
