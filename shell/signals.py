"""Ctrl-C and SIGTERM for a program that owns the process. The library takes no signals; this is only for the command.

An interrupt unwinds the stack, so that `with` gives everything back; a second one while that happens ends at once.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class _Once:
    def __init__(self) -> None:
        self.unwinding = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.unwinding:
            os._exit(128 + number)
        self.unwinding = True
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)


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
    show = sys.unraisablehook

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        # The interrupt met a destructor, which swallowed it: it is sent again.
        if lost.exc_type is KeyboardInterrupt:
            _thread.interrupt_main()
        else:
            show(lost)

    sys.unraisablehook = unraisable
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
