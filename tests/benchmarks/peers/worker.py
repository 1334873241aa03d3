"""The runner's side of a worker: one engine in a process of its own, of which only one is ever awake.

A worker is stopped (SIGSTOP) as soon as it has answered, and continued for its next question, so that no engine's idle
threads take time from another.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import HERE, Peer


class Failed(Exception):
    """A question that was not answered; the message says why."""


@dataclass(frozen=True)
class Answer:
    value: Any
    seconds: float  # that the engine took, without the way there and back
    peak: int  # bytes: the most that the process had so far


class Worker:
    """A live process. Raises Failed where it dies, does not answer in time, or says that it cannot."""

    def __init__(self, peer: Peer, python: Path, threads: int, log: Path, cache: Path) -> None:
        """`cache` is where the engine finds what it has kept of earlier lives."""
        self.peer = peer
        variables = {"OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(cache)}
        self._log = log.open("a")
        self._process = subprocess.Popen(
            [str(python), str(HERE / "serve.py"), peer.engine, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | variables,
        )
        self._unread = b""
        try:
            hello = self._receive(120)
        except BaseException:
            self.close()
            raise
        self._stop()
        self.import_s: float = hello["import_s"]
        self.version: str = hello["version"]
        self.imported: int = hello["memory"]["now"]  # bytes

    def ask(self, do: str, *, limit_s: float = 300, **arguments: Any) -> Answer:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._receive(limit_s)
        except OSError as error:
            raise Failed(f"its process died ({self._process.poll()})") from error
        finally:
            self._stop()
        if "error" in reply:
            raise Failed(reply["error"])
        return Answer(reply["value"], reply["seconds"], reply["memory"]["peak"])

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                stream and stream.close()

    def _stop(self) -> None:
        if self.alive:
            self._process.send_signal(signal.SIGSTOP)

    def _receive(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        pieces = [self._unread]
        descriptor = self._process.stdout.fileno()
        while b"\n" not in pieces[-1]:
            if not select.select([descriptor], [], [], limit_s)[0]:
                self._process.kill()
                raise Failed(f"no answer after {limit_s:.0f} s")
            piece = os.read(descriptor, 1 << 20)
            if not piece:
                raise Failed(f"its process ended with {self._process.wait()}; the log says why: {self._log.name}")
            pieces.append(piece)
        line, _, self._unread = b"".join(pieces).partition(b"\n")
        return dict(json.loads(line))
