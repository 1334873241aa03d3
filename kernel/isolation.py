"""Calls of plugins' code, so that one that raises, hangs or answers nonsense fails a call and not the kernel.

    Lane      a thread for each plugin: calls run there one at a time, and may take so long. A call that takes longer is
              given up: its thread is left to itself, a new one goes on with the next.
    within    a thread for one call, for what reads files: imports, opening a model. It may take minutes.
    Guard     calls in the kernel's own thread, for what has to be quick. One that takes too long is interrupted by an
              exception in that thread, which stops Python code, but neither a call into C (time.sleep, say) nor a loop
              all of which is in a `try` that swallows everything.

A plugin whose hook fails three times in a row is off: its calls fail at once. Python in one process is no sandbox: this
holds mistakes, not malice.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from types import NoneType
from typing import Any, TypeVar

from llm_os.kernel.errors import Closed, Error, PluginError

T = TypeVar("T")

MAX_FAILURES = 3
_MAX_STEPS, _MAX_EVENTS = 1024, 65536  # that wait for a plugin
_FEW = 64  # events that are still told when the kernel closes
_LINGER_S = 0.02
_LONGEST = 500  # characters of what went wrong
_log = logging.getLogger("llm_os.plugins")


class Health:
    """How a plugin does."""

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        self.off: str | None = None  # why it is called no more
        self._failures: dict[str, int] = {}  # in a row, by hook

    def well(self, hook: str) -> None:
        if self._failures:
            self._failures.pop(hook, None)

    def failed(self, hook: str, how: str) -> PluginError:
        """Note a failure; the error to tell. Three in a row of one hook turn the plugin off."""
        what = " ".join(f"{hook} {how}".split())[:_LONGEST]
        failures = self._failures[hook] = self._failures.get(hook, 0) + 1  # another thread may note that it is well
        message = f"plugin {self.plugin!r}: {what}"
        _log.error(message)
        if failures >= MAX_FAILURES and self.off is None:
            self.off = f"plugin {self.plugin!r} is off: it failed {MAX_FAILURES} times in a row, last: {what}"
            _log.error(self.off)
        return PluginError(message)


class _Job:
    """One call. `future` is None for an event, whose result nobody waits for."""

    __slots__ = ("arguments", "droppable", "function", "future", "hook")

    def __init__(
        self,
        hook: str,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        future: Future[Any] | None,
        droppable: bool = False,
    ) -> None:
        self.hook, self.function, self.arguments, self.future = hook, function, arguments, future
        self.droppable = droppable


class Lane:
    """One plugin's thread. Its calls may be made from any thread."""

    def __init__(self, health: Health, limit_s: float) -> None:
        self.health = health
        self._limit_s = limit_s
        self._jobs: deque[_Job] = deque()
        self._ready = threading.Condition()  # guards everything below
        self._current: tuple[_Job, float] | None = None  # what runs, and since when
        self._thread: threading.Thread | None = None
        self._waits = False  # the thread waits for a job
        self._lingers = False  # it looks again in a moment: no event has to wake it, which costs more than the event
        self._closed = False
        self._missed = 0  # events that came too fast for the plugin

    def call(self, hook: str, kind: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function(*arguments)` returns, which must be of type `kind`, or of one of them; `object` is anything
        but None.

        Raises PluginError if it is not, if the call raises or takes too long, and an Error of ours as it is."""
        return self.start(hook, kind, function, *arguments)()

    def start(self, hook: str, kind: Any, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Begin a call, without waiting for it: what is returned waits, and returns or raises what `call` would."""
        future: Future[Any] = Future()
        if self.health.off is None:
            self._put(_Job(hook, function, arguments, future))
        else:
            future.set_exception(PluginError(self.health.off))
        return partial(self._finish, hook, kind, future)

    def _finish(self, hook: str, kind: type | tuple[type, ...], future: Future[Any]) -> Any:
        try:
            result = self._wait(future)
        except PluginError:
            raise
        except Error:  # the plugin says no in our words
            self.health.well(hook)
            raise
        except Exception as error:
            raise self.health.failed(hook, f"raised {told(error)}") from error
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(result) not in kinds and not (object in kinds and result is not None):
            names = " or ".join("None" if k is NoneType else k.__name__ for k in kinds)
            raise self.health.failed(hook, f"gave {type(result).__name__}, no {names}")
        self.health.well(hook)
        return result

    def post(self, hook: str, function: Callable[..., Any], *arguments: Any, droppable: bool = False) -> None:
        """Call it for its effect, some time soon. Never waits. Of those that are `droppable`, only so many wait."""
        if self.health.off is not None:
            return
        if len(self._jobs) >= (_MAX_STEPS if droppable else _MAX_EVENTS):
            self._missed += 1
            self._give_up()
            return
        self._put(_Job(hook, function, arguments, None, droppable))

    def shut(self) -> None:
        """Take no more calls. What waits is still done, but for events that may be dropped where there are many."""
        with self._ready:
            self._closed = True
            slow = len(self._jobs) > _FEW
            kept = [job for job in self._jobs if not (slow and job.droppable)]
            self._missed += len(self._jobs) - len(kept)
            self._jobs.clear()
            self._jobs.extend(kept)
            self._ready.notify()
        if self._missed:
            _log.warning("plugin %r was too slow for %d events", self.health.plugin, self._missed)

    def wait(self, until: float) -> None:
        """After `shut`: until what waits is done, or that time has come. What hangs is given up."""
        while (thread := self._thread) is not None and thread.is_alive() and time.monotonic() < until:
            with self._ready:
                since = self._current[1] if self._current is not None else time.monotonic()
            thread.join(max(0.001, min(until, since + self._limit_s) - time.monotonic()))
            self._give_up()
        with self._ready:
            left, hangs = list(self._jobs), self._current
            self._jobs.clear()
        if hangs is not None:
            _log.error("plugin %r: %s has not come back; its thread is left behind", self.health.plugin, hangs[0].hook)
            left.append(hangs[0])
        for job in left:
            if job.future is not None:
                _settle(job.future, error=PluginError(f"plugin {self.health.plugin!r}: the kernel is closed"))

    def _put(self, job: _Job) -> None:
        with self._ready:
            if self._closed:  # the kernel has closed while an answer was on its way through a filter
                if job.future is not None:
                    job.future.set_exception(Closed("the kernel is closed"))
                return
            self._jobs.append(job)
            if self._thread is None:
                self._start()
            elif self._waits or (self._lingers and job.future is not None):
                self._waits = self._lingers = False
                self._ready.notify()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"llm-os-plugin-{self.health.plugin}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._ready:
                if self._thread is not me:  # it was given up
                    return
                self._current = None
                lingered = False
                while not self._jobs:
                    if self._closed:
                        return
                    if lingered:
                        self._waits = True
                        self._ready.wait()
                    else:
                        self._lingers = lingered = True
                        self._ready.wait(_LINGER_S)
                        self._lingers = False
                    if self._thread is not me:
                        return
                job = self._jobs.popleft()
                self._current = (job, time.monotonic())
            self._perform(job)
            del job

    def _perform(self, job: _Job) -> None:
        if self.health.off is not None:  # since it was asked for: many that hang would hold up who waits for them
            if job.future is not None:
                _settle(job.future, error=PluginError(self.health.off))
            return
        error, result = None, None
        try:
            result = job.function(*job.arguments)
        except BaseException as raised:
            error = raised if isinstance(raised, Exception) else RuntimeError(told(raised))
        if job.future is not None:
            _settle(job.future, result, error)
        elif self._thread is not threading.current_thread():
            return  # it was given up, which has been told
        elif error is not None:
            self.health.failed(job.hook, f"raised {told(error)}")
        elif result is not None:
            self.health.failed(job.hook, f"gave {type(result).__name__}; events return nothing")
        else:
            self.health.well(job.hook)

    def _wait(self, future: Future[Any]) -> Any:
        """Each call has the whole limit, however long those before it took."""
        while True:
            with self._ready:
                since = self._current[1] if self._current is not None else time.monotonic()
            with suppress(TimeoutError):
                return future.result(max(0.001, since + self._limit_s - time.monotonic()))
            if future.done():  # it raised TimeoutError itself, or came at the last moment
                return future.result()
            self._give_up()

    def _give_up(self) -> None:
        """Leave a call that takes too long to itself, and go on with the next one in another thread."""
        with self._ready:
            if self._current is None or time.monotonic() - self._current[1] < self._limit_s:
                return
            (job, _), self._current = self._current, None
            self._start()
        error = self.health.failed(job.hook, f"took longer than {self._limit_s:g} s")
        if job.future is not None:
            _settle(job.future, error=error)


def within(limit_s: float, function: Callable[[], T], late: Callable[[T], Any] = lambda result: None) -> T:
    """What `function()` returns, or raises, in a thread of its own: for what may take long, and several at once.

    Raises TimeoutError where it takes longer; the thread is left to itself, and `late` gets what still comes of it."""
    done: Future[T] = Future()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:
            _settle(done, error=error if isinstance(error, Exception) else RuntimeError(told(error)))
            return
        _settle(done, result)
        if done.exception() is not None:
            late(result)

    threading.Thread(target=work, name="llm-os-plugin", daemon=True).start()
    with suppress(TimeoutError):
        return done.result(limit_s)
    _settle(done, error=TimeoutError(f"it took longer than {limit_s:g} s"))
    return done.result()  # which may have come at the last moment


class Guard:
    """Calls in one thread, the kernel's; watched from another, which starts with the first of them.

    The watcher may raise only while a call runs, or it would end the kernel. CPython looks for such an exception, and
    for another thread that wants to run, after calls, at a function's start and when a loop goes round: between two
    statements without any of these a thread is alone. Both sides rely on it, and on no lock."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: float | None = None
        self._caller = ctypes.c_ulong(0)
        self._watched = False
        self._closed = threading.Event()

    def call(self, health: Health, hook: str, function: Callable[[], T]) -> T | None:
        """What `function()` returns; None where it failed, or is off. All that touches what a plugin gave belongs into
        it, the check of the result too."""
        if health.off is not None:
            return None
        if not self._watched:
            self._watch()
        how = None
        self._caller, self._since = ctypes.c_ulong(threading.get_ident()), time.monotonic()
        try:
            try:
                result = function()
                self._since = None  # alone
            except BaseException as error:
                self._since = None  # alone
                how = self._late if isinstance(error, _Overrun) else f"raised {told(error)}"
            time.monotonic()  # what was raised while `function` returned comes up here
        except _Overrun:
            how = self._late
        if how is not None:
            health.failed(hook, how)
            return None
        health.well(hook)
        return result

    def close(self) -> None:
        self._closed.set()

    @property
    def _late(self) -> str:
        return f"took longer than {self._limit_s:g} s"

    def _watch(self) -> None:
        self._watched = True
        threading.Thread(target=self._observe, name="llm-os-guard", daemon=True).start()

    def _observe(self) -> None:
        """An exception may be swallowed where it comes up, by an `except:` say: so it is raised until the call ends."""
        pause, overrun = self._limit_s / 4, ctypes.py_object(_Overrun)
        while not self._closed.wait(pause):
            now, limit_s, interrupt = time.monotonic(), self._limit_s, ctypes.pythonapi.PyThreadState_SetAsyncExc
            pause = limit_s / 4
            if (since := self._since) is not None and now - since >= limit_s:
                interrupt(self._caller, overrun)  # alone since `since` was read: it is still the same call
                pause = 0.002


class _Overrun(BaseException):
    """Raised inside a call that takes too long. No `except Exception` of a plugin stops it."""


def told(error: BaseException) -> str:
    """What happened, in one line, whatever the plugin's exception does when it is asked."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]
    except BaseException:
        return type(error).__name__


def _settle(future: Future[Any], result: Any = None, error: Exception | None = None) -> None:
    """The first to come counts: the call, or who gave it up."""
    with suppress(Exception):  # InvalidStateError
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
