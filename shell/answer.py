"""An answer on its way from a kernel to stdout, and what is shown until its first word.

Knows streams and terminals; does not know commands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import llm_os
from llm_os.shell import signals
from llm_os.shell.progress import Waiting
from llm_os.shell.stdio import printable


class Answer:
    """Text to stdout, as it comes. What a terminal would obey instead of show is shown as �."""

    def __init__(self) -> None:
        self._open_line = False
        self._terminal = sys.stdout.isatty()

    def write(self, text: str) -> None:
        if text:
            self._open_line = not text.endswith("\n")  # first: an interrupt may come before the text is flushed
            sys.stdout.write(printable(text) if self._terminal else text)
            sys.stdout.flush()

    def end(self) -> None:
        """The next thing begins on a line of its own."""
        if self._open_line:
            self._open_line = False
            sys.stdout.write("\n")
        sys.stdout.flush()


def boot(config: llm_os.Config) -> llm_os.Kernel:
    """A kernel. Ctrl-C ends the process at once until it is there. Raises what Kernel raises."""
    with signals.abrupt():
        return llm_os.Kernel(config)


def checked(text: str) -> str:
    """`text`, if it was decoded whole from what was typed or given. Raises RequestError."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise llm_os.RequestError("the prompt is not UTF-8 text; check the terminal's locale or the file's encoding")
    return text


def stream(
    kernel: llm_os.Kernel, request: llm_os.Request, waiting: Waiting, write: Callable[[str], None] | None
) -> llm_os.Completion:
    """Hand each piece of the answer to `write`. Raises what the stream raises; leaving early ends the process."""
    with waiting, kernel.stream(request) as chunks:
        signals.check()
        for chunk in chunks:
            signals.check()
            if write is not None and chunk.text:
                waiting.stop()
                write(chunk.text)
        assert chunks.completion is not None
        return chunks.completion


def state(kernel: llm_os.Kernel, model: str) -> str:
    """What a kernel with one request does before the first word of its answer."""
    if not any(info.name == model and info.where == "on device" for info in kernel.models()):
        return f"loading {model}"
    for process in kernel.ps():
        if process.prompt_tokens and process.completion_tokens == 0:
            return f"reading the prompt, {process.computed_tokens} of {process.prompt_tokens} tokens"
    return "answering"
