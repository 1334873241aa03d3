"""Ctrl-C and SIGTERM for a program that owns the process. The library takes no signals; this is only for the command.

An interrupt unwinds the stack, so that `with` gives everything back; a second one while that happens ends at once.
Code that is not ours may swallow the exception: `check` raises it again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class _Once:
    def __init__(self) -> None:
        self.came = 0
        self.abrupt = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.came or self.abrupt:
            if os.isatty(2):
                os.write(2, b"\r\x1b[2K\n")
            os._exit(128 + number)
        self.came = number
        self.check()

    def check(self) -> None:
        if self.came:
            raise KeyboardInterrupt if self.came == signal.SIGINT else SystemExit(TERMINATED)


def check() -> None:
    """Call on the way to where people wait. Raises the interrupt that came and was lost."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, _Once):
        handler.check()


@contextmanager
def abrupt() -> Iterator[None]:
    """Inside, an interrupt ends the process at once. For what imports libraries in C, which an exception may abort, or
    which swallow it, and where nothing is held yet that has to be given back."""
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(handler, _Once):
        yield
        return
    handler.abrupt = True
    try:
        yield
    finally:
        handler.abrupt = False


@contextmanager
def handled() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, SIGTERM raises SystemExit. After it an interrupt ends the process quietly."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = _Once()
    taken = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """Inside, every Ctrl-C is only a KeyboardInterrupt: for a program that stops what it does and goes on."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
