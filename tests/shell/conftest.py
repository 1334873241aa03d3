"""The real program: as a subprocess with pipes, and at a terminal (a pty) that reads and types.

Nothing here sleeps: a test waits for output, for an end, or for a peer, and fails with what it saw at a far deadline.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

DEADLINE_S = 60.0
PROGRAM = (sys.executable, "-m", "llm_os")
# A terminal does this for the program that it starts: the pty becomes what Ctrl-C is typed at.
_AT_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture
def sim() -> list[str]:
    """Options of a machine that costs nothing."""
    return ["--driver", "sim", "--memory", "64MiB"]


@pytest.fixture
def endless() -> str:
    """A model that never stops of itself."""
    return "sim:a?context_length=100000000&kv_bytes_per_token=1"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user without a store, and a terminal of known habits."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LLM_OS_", "PYTHON"))}
    return inherited | {
        "LLM_OS_HOME": str(tmp_path / "home"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "PYTHONIOENCODING": "utf-8",
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody answers "where is the cursor?" here
        "OMP_NUM_THREADS": "2",
    }


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """`run("models", "--json")`: the program to its end, with an empty stdin unless `input` says otherwise."""

    def run(*arguments: str, input: str | bytes = "", **changed: str) -> subprocess.CompletedProcess[str]:
        data = input if isinstance(input, bytes) else input.encode()
        done = subprocess.run(
            [*PROGRAM, *arguments], input=data, capture_output=True, env=environment | changed, timeout=DEADLINE_S
        )
        out, err = (text.decode() for text in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)

    return run


class Program:
    """A program that runs. `read_until` collects what it says on one file; `end` waits for it."""

    def __init__(self, process: subprocess.Popen[bytes], output: int) -> None:
        self.process = process
        self.seen = b""
        self._output = output

    def read_until(self, *wanted: str) -> str:
        """Everything up to and with the first of `wanted`, taken out of `seen`."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            found = [
                self.seen.index(text.encode()) + len(text.encode()) for text in wanted if text.encode() in self.seen
            ]
            if found:
                end = min(found)
                text, self.seen = self.seen[:end], self.seen[end:]
                return text.decode(errors="replace")
            if not self._read(deadline):
                raise AssertionError(f"{wanted} did not come; there was {self.seen[-2000:]!r}")

    def type(self, text: str) -> None:
        os.write(self._output, text.encode())

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """The exit code, and what was said and not yet read."""
        deadline = time.monotonic() + DEADLINE_S
        while self._read(deadline):
            pass
        rest, self.seen = self.seen, b""
        return self.process.wait(DEADLINE_S), rest.decode(errors="replace")

    def close(self) -> None:
        if self._output >= 0:
            os.close(self._output)
            self._output = -1

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing came before the deadline after {self.seen[-2000:]!r}"
        try:
            data = os.read(self._output, 1 << 16)
        except OSError:  # a pty whose other side has gone
            return False
        self.seen += data
        return bool(data)


@pytest.fixture
def started() -> Iterator[list[Program]]:
    programs: list[Program] = []
    yield programs
    for program in programs:
        program.close()
        if program.process.poll() is None:
            program.process.kill()
        program.process.wait()
        for stream in (program.process.stdin, program.process.stderr):
            if stream is not None:
                stream.close()


Start = Callable[..., Program]


@pytest.fixture
def start(environment: dict[str, str], started: list[Program]) -> Start:
    """`start("run", …)`: the program with pipes; its stdout is read as it comes, stderr is `process.stderr`."""

    def start(*arguments: str, **changed: str) -> Program:
        reader, writer = os.pipe()
        process = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            env=environment | changed,
        )
        os.close(writer)
        started.append(Program(process, reader))
        return started[-1]

    return start


@pytest.fixture
def terminal(environment: dict[str, str], started: list[Program]) -> Start:
    """`terminal("chat", …)`: the program at a terminal of 100 columns, or with another `stdin`."""

    def terminal(*arguments: str, stdin: IO[Any] | None = None, **changed: str) -> Program:
        import fcntl
        import struct
        import termios

        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-c", _AT_TERMINAL, *PROGRAM, *arguments],
            stdin=theirs if stdin is None else stdin,
            stdout=theirs,
            stderr=theirs,
            env=environment | changed,
            start_new_session=True,
        )
        os.close(theirs)
        started.append(Program(process, ours))
        return started[-1]

    return terminal
