"""`--tool` of `llm-os run` and `chat`: tools by name, and the person at the terminal who is asked before one runs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio

import llm_os
from llm_os.shell.progress import Waiting
from llm_os.shell.stdio import say
from llm_os.tools import Call, Ended, Permissions, Question, Result, Said, converse, make_tool

_MOST_SHOWN = 20_000  # characters of arguments; nobody can judge what is not shown


def find(kernel: llm_os.Kernel, names: Sequence[str]) -> list[llm_os.Tool]:
    """The tools of these names: `module:function`, a function or a Tool in a module of the operator's, or the name of
    one that a plugin offers. Raises ConfigError."""
    offered = {tool.name: tool for tool in kernel.tools}
    return [_load(name) if ":" in name else _offered(name, offered) for name in names]


def _offered(name: str, offered: dict[str, llm_os.Tool]) -> llm_os.Tool:
    if name not in offered:
        there = ", ".join(offered) or "none; enable a plugin that has some, such as: llm-os plugins enable tools"
        raise llm_os.ConfigError(f"no plugin offers a tool {name!r}; offered are: {there}")
    return offered[name]


def _load(name: str) -> llm_os.Tool:
    module, _, path = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a file here must not stand in for a library
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise llm_os.ConfigError(f"--tool {name}: {type(error).__name__}: {error}") from error
    return found if isinstance(found, llm_os.Tool) else make_tool(found)


def _ask(question: Question) -> Any:
    shown = json.dumps(
        question.arguments, ensure_ascii=True, indent=1
    )  # ASCII: nothing hides, nothing moves the cursor
    if len(shown) > _MOST_SHOWN:
        say(f"llm-os: {question.tool} is refused: its arguments have {len(shown)} characters, too many to be shown")
        return "no"
    what = f" ({json.dumps(question.what)})" if question.what else ""
    _forget_typed()
    sys.stderr.write(f"The model asks for {question.tool}{what}: {shown}\nAllow it? [o]nce, for this [s]ession, [N]o: ")
    sys.stderr.flush()
    answer = sys.stdin.readline().strip().lower()
    return {"o": "once", "once": "once", "s": "session", "session": "session"}.get(answer, "no")


def _forget_typed() -> None:
    """What was typed before the question is no answer to it."""
    try:
        import termios

        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
    except (ImportError, OSError, ValueError):  # no such terminal
        return


class Tools:
    """Tools of one session, and who is asked: whoever sits at the terminal. Without one, what needs permission is
    refused. Raises ConfigError."""

    def __init__(self, kernel: llm_os.Kernel, names: Sequence[str]) -> None:
        self._kernel = kernel
        self._tools = find(kernel, names)
        there = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
        self._permissions = Permissions(ask=_ask if there else None)

    def answer(self, request: llm_os.Request, waiting: Waiting, write: Callable[[str], None] | None) -> Ended:
        """Hand each piece of the answer to `write`; calls and their results are told on stderr. Raises what `converse`
        does."""

        async def main() -> Ended:
            ended: Ended | None = None
            async for event in converse(self._kernel, request, tools=self._tools, permissions=self._permissions):
                waiting.stop()
                match event:
                    case Said(text) if write is not None:
                        write(text)
                    case Call():
                        say(f"llm-os: {event.name or 'a tool'} {json.dumps(event.arguments)}")
                    case Result():
                        how = "failed" if event.error else "said"
                        say(f"llm-os: {event.call.name or 'a tool'} {how}: {event.text}")
                    case Ended():
                        ended = event
            assert ended is not None
            return ended

        with waiting:
            return anyio.run(main)
