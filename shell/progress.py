"""What is shown while people wait: one line on stderr that is written over, or short plain lines if no one watches.

Knows how a pull tells its progress; does not know the network or the kernel.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import llm_os
from llm_os.shell import signals, stdio

_INTERVAL_S = 0.1
_PATIENCE_S = 0.4  # what is done sooner needs no words
_BAR = 24
_PHASES = {"resolving": "looking for it", "unpacking": "unpacking", "verifying": "checking its sha256"}


class Line:
    """A line of a terminal that each `show` writes over. Shows nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False

    def show(self, text: str) -> None:
        if self.live:
            self._shown = True
            self._write(f"\r\x1b[2K{stdio.one_line(text)[: _columns() - 1]}")

    def clear(self) -> None:
        if self._shown:
            self._shown = False
            self._write("\r\x1b[2K")

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            self.live = False


class Waiting:
    """While inside, and after a moment of patience, what is waited for and the seconds so far are shown.

    `describe` may be replaced on the way. `stop` is final; entering twice is entering once.
    """

    def __init__(self, what: str) -> None:
        self.describe: Callable[[], str] = lambda: what
        self._line = Line()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llm-os-waiting", daemon=True)

    def __enter__(self) -> Self:
        if self._line.live and not self._stopped.is_set() and not self._thread.is_alive():
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        begun = time.monotonic()
        if not self._stopped.wait(_PATIENCE_S):
            while not self._stopped.is_set():
                self._line.show(f"{self.describe()} … {time.monotonic() - begun:.0f} s")
                self._stopped.wait(_INTERVAL_S)
        self._line.clear()


class _Pull:
    """The story of one pull."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._line = Line()
        self._begun = self._last = 0.0
        self._phase = ""
        self._noted = ""

    def __call__(self, progress: llm_os.Progress) -> None:
        now = time.monotonic()
        if progress.note and progress.note != self._noted:
            self._noted = progress.note
            self._line.clear()
            stdio.say(progress.note)
        if progress.phase != self._phase:
            self._phase, self._begun, self._last = progress.phase, now, 0.0
            if progress.phase == "downloading" and not self._line.live:
                size = f", {megabytes(progress.total_bytes)}" if progress.total_bytes else ""
                stdio.say(f"pulling {self._model} from {progress.source}{size}")
        if now - self._last >= _INTERVAL_S or progress.done_bytes == progress.total_bytes:
            self._last = now
            self._line.show(self._text(progress, now - self._begun))

    def clear(self) -> None:
        self._line.clear()

    def _text(self, progress: llm_os.Progress, elapsed: float) -> str:
        head, done, total = f"pulling {self._model}", progress.done_bytes, progress.total_bytes
        if progress.phase != "downloading" or not done:
            return f"{head}  {_PHASES.get(progress.phase, 'connecting')} …"
        speed = done / elapsed if elapsed > 0.5 else 0.0
        rate = f"  {megabytes(int(speed))}/s" if speed else ""
        if not total:
            return f"{head}  {megabytes(done)}{rate}"
        left = f"  {(total - done) / speed:.0f} s left" if speed and done < total else ""
        return f"{head}  {bar(done / total)} {done * 100 // total:3d}%  {done / 1e6:.1f}/{megabytes(total)}{rate}{left}"


def pull(model: str) -> Path:
    """Where `model` is; it is downloaded if it is not there, with progress on stderr. Raises what Store.pull raises."""
    story = _Pull(model)
    try:
        return llm_os.Store().pull(model, progress=story)
    finally:
        story.clear()


def fetch(model: str, config: llm_os.Config) -> None:
    """See to it that a kernel can open `model`. Raises ModelNotFound, StoreError."""
    try:
        pull(model)
    except llm_os.ModelNotFound:
        with signals.abrupt():
            llm_os.open_image(model, config).close()  # not the store's, but a plugin may know it


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def bar(share: float) -> str:
    """A share from 0 to 1, drawn."""
    full = round(min(max(share, 0.0), 1.0) * _BAR)
    if (sys.stderr.encoding or "").lower().replace("-", "") != "utf8":
        return f"[{'#' * full}{' ' * (_BAR - full)}]"
    return "━" * full + "╌" * (_BAR - full)


def _columns() -> int:
    try:
        return max(20, os.get_terminal_size(sys.stderr.fileno()).columns)
    except (OSError, ValueError):
        return 80
