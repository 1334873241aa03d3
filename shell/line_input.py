"""The line that a person types: with editing and history at a terminal, plain lines from a pipe.

Knows keys and lines; does not know what is said. A message may have several lines: Alt-Enter, a pasted text, or a
backslash at the end of a line goes on with the next.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import llm_os
from llm_os.shell.signals import TERMINATED
from llm_os.shell.stdio import say

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

_LONGEST = 16 << 20


class LineInput(Protocol):
    interactive: bool

    def read(self) -> str | None:
        """The next message, None at the end; bytes that are no UTF-8 come as surrogates. Raises KeyboardInterrupt, and
        RequestError for a message that is far too long."""
        ...


def open_input() -> LineInput:
    return _Terminal() if sys.stdin.isatty() and sys.stderr.isatty() else _Pipe()


class _Pipe:
    interactive = False

    def read(self) -> str | None:
        lines: list[str] = []
        size = 0
        while data := sys.stdin.buffer.readline(_LONGEST + 1):
            size += len(data)
            if size > _LONGEST:
                raise llm_os.RequestError(f"a message on stdin is longer than {_LONGEST} bytes; shorten it")
            line = data.decode(errors="surrogateescape").rstrip("\r\n")
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        return "\n".join(lines) if lines else None


class _Terminal:
    interactive = True

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=_history(llm_os.Store().path.parent / "chat_history"),
            key_bindings=_keys(),
            output=create_output(sys.stderr),
            enable_suspend=True,
        )

    def read(self) -> str | None:
        handler = signal.getsignal(signal.SIGTERM)
        try:
            return self._session.prompt(pre_run=self._end_when_terminated)
        except EOFError:
            return None
        except KeyboardInterrupt:
            say("Ctrl-D or /bye leaves.")
            return ""
        finally:
            signal.signal(signal.SIGTERM, handler)

    def _end_when_terminated(self) -> None:
        """An exception out of a signal handler would tear the editor's event loop apart: it ends in order instead."""

        def end() -> None:
            with suppress(Exception):  # it is ending already
                self._session.app.exit(exception=SystemExit(TERMINATED))

        with suppress(NotImplementedError):  # Windows, which has no SIGTERM to speak of
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def accept(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def next_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    @keys.add("c-c")
    @keys.add("<sigint>")
    def interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

    return keys


def _history(path: Path) -> History:
    """Kept for its owner's eyes; in memory only, where the file cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class OwnHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):
                super().store_string(string.encode(errors="replace").decode())

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
    except OSError:
        return InMemoryHistory()
    return OwnHistory(path)
