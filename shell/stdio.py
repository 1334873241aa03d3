"""Where text goes: the answer to stdout, all else to stderr. Writes any text to any terminal without failing.

Does not know what the text means.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"} | {0x0D: None}
_LONGEST = 1000


def prepare() -> None:
    """Call once, first: from here on no character is one that stdout or stderr cannot write."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        elif (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")


def printable(text: str) -> str:
    """`text` for a terminal: a model or a file name does not get to move the cursor or set the window's title."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    line = printable(" ".join(text.splitlines()))
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def say(text: str) -> None:
    """One line on stderr."""
    try:
        sys.stderr.write(f"{one_line(text)}\n")
        sys.stderr.flush()
    except OSError:  # nobody reads it
        return


def abandon_stdout() -> None:
    """After a broken pipe: nothing more is written, not even by the interpreter as it ends."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, sys.stdout.fileno())
    except (OSError, ValueError):
        return
    finally:
        os.close(devnull)
