"""Tries a grammar in a process of its own, with a limit of time, memory and stack, before the kernel's compiles it.

llguidance has limits of its own, but some inputs pass by them: a chain of ten thousand references overflows the stack,
`multipleOf: 999983` takes half a minute. The process is kept for the next grammar; one that breaks is replaced.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llm_os import RequestError

T = TypeVar("T")

LIMIT_S = 2.0
_START_S = 2.5  # for the process to be there


class Trial:
    """One process, started when it is needed. Calls come one at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, kind: str, source: str, limits: dict[str, Any], options: dict[str, Any]) -> tuple[str, str]:
        """What is wrong with a grammar, and where in a schema: "" if nothing is. Raises RequestError where the trial
        breaks its limits, or does not start, OSError if there can be no process."""
        question = json.dumps({"kind": kind, "source": source, "limits": limits, "options": options}).encode()
        process = self._process
        if process is None or process.poll() is not None:
            self.close()
            process = self._start()
            if _within(_START_S, process, partial(_read, process))[0] is None:
                self.close()
                raise RequestError(f"grammars cannot be tried here: their process was not there in {_START_S:g} s")
        reply, late = _within(LIMIT_S, process, partial(_exchange, process, question))
        if reply is None:
            code = process.wait()
            self.close()
            raise RequestError(_broken(late, code))
        answer = json.loads(reply)
        return answer["wrong"], answer["where"]

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:  # what it had not read yet
                        continue

    def _start(self) -> subprocess.Popen[bytes]:
        file = Path(__file__).with_name("trial_process.py")
        self._process = subprocess.Popen(  # noqa: S603 - our own file, no shell
            [sys.executable, "-I", str(file), *filter(os.path.isabs, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
        )
        return self._process


def _within(limit_s: float, process: subprocess.Popen[bytes], work: Callable[[], T]) -> tuple[T, bool]:
    """What `work` gives, and whether the process was ended because it took too long."""
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit_s, give_up)
    timer.start()
    try:
        result = work()
    finally:
        timer.cancel()
        timer.join()
    return result, late.is_set()


def _exchange(process: subprocess.Popen[bytes], question: bytes) -> bytes | None:
    """The answer, or None if the process ends instead."""
    assert process.stdin is not None
    try:
        process.stdin.write(struct.pack("<I", len(question)) + question)
        process.stdin.flush()
    except OSError:
        return None
    return _read(process)


def _read(process: subprocess.Popen[bytes]) -> bytes | None:
    assert process.stdout is not None
    head = process.stdout.read(4)
    return process.stdout.read(struct.unpack("<I", head)[0]) or None if len(head) == 4 else None


def _broken(late: bool, code: int) -> str:
    if late:
        return f"it takes longer than {LIMIT_S:g} s to compile; make it simpler"
    return f"it needs more memory or deeper nesting than a grammar may (its trial ended with {code}); make it simpler"
