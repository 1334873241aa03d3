"""Programs as tools: an argument list, never a shell; a folder, an environment, a time and an output of their own.

    word_count = program("word_count", "Count the words of a file.", ["wc", "-w", "--", "{file}"],
                         {"file": Annotated[str, msgspec.Meta(pattern="^[a-z]+[.]txt$")]}, folder=Path("notes"))

A folder and an environment are no jail: a program can open any file that the operator can. Choose programs and
arguments accordingly, or run llm-os in a container.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Any

import anyio
import msgspec
from anyio.abc import Process

from llm_os import ConfigError, Tool
from llm_os.plugins.tools.schema import schema_of

_HOLE = re.compile(r"\{(\w+)\}")
_GRACE_S = 2.0  # between SIGTERM and SIGKILL


def program(
    name: str,
    description: str,
    command: Sequence[str],
    parameters: Mapping[str, Any],
    *,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    argument_class: Callable[[Mapping[str, Any]], str] | None = None,
    timeout_s: float = 30.0,
    output_limit: int = 65536,
    expected_s: float | None = None,
) -> Tool:
    """A Tool that runs `command` in `folder`; `{x}` in an argument stands for the argument x, of the type that
    `parameters` gives it. An argument stays one argument, whatever is in it.

    The program's environment is PATH and `environment`, nothing else; its input is empty. What it prints, errors too,
    is what it says; past `output_limit` characters and after `timeout_s` it is ended, with all its children: they are
    one process group. A value that begins with "-" is refused where it would be an argument of its own, unless "--"
    stands before it: it would be an option. `argument_class` is the whole command line by default. Raises ConfigError.
    """
    if not command or _HOLE.search(command[0]):
        raise ConfigError(f"the command of tool {name!r} must begin with the name of a program")
    holes = {hole for part in command for hole in _HOLE.findall(part)}
    if unknown := sorted(holes - set(parameters)):
        raise ConfigError(f"the command of tool {name!r} has {{{unknown[0]}}}, which is none of its parameters")
    if not folder.is_dir():
        raise ConfigError(f"tool {name!r} is to run in {folder}, which is no folder")
    kind, schema = schema_of(name, parameters)

    def line(arguments: Mapping[str, Any]) -> list[str]:
        made = msgspec.convert(dict(arguments), kind)
        values = {field: str(getattr(made, field)) for field in kind.__struct_fields__}
        return _filled(command, values)

    async def call(arguments: Mapping[str, Any]) -> str:
        return await _run(line(arguments), folder, dict(environment or {}), output_limit)

    return Tool(
        name=name,
        description=description,
        parameters=schema,
        call=call,
        argument_class=argument_class or (lambda arguments: msgspec.json.encode(line(arguments)).decode()),
        timeout_s=timeout_s,
        output_limit=output_limit,
        expected_s=expected_s,
    )


def _filled(command: Sequence[str], values: Mapping[str, str]) -> list[str]:
    filled: list[str] = []
    for part in command:
        whole = _HOLE.sub(lambda hole: values[hole[1]], part)
        if "\0" in whole:
            raise ValueError("an argument has a NUL character")
        if part.startswith("{") and whole.startswith("-") and "--" not in command[: len(filled)]:
            raise ValueError(f"{whole[:80]!r} would be an option; no argument may begin with -")
        filled.append(whole)
    return filled


async def _run(command: list[str], folder: Path, environment: dict[str, str], limit: int) -> str:
    environment = {"PATH": os.environ.get("PATH", os.defpath), **environment}
    process = await anyio.open_process(
        command, cwd=folder, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True
    )
    output = bytearray()
    too_much = False

    async def read() -> None:
        nonlocal output, too_much
        assert process.stdout is not None
        async for piece in process.stdout:
            output += piece
            if len(output) > 4 * limit:  # bytes of a character
                too_much = True
                _signal(process, signal.SIGKILL)
                return

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await process.wait()
            _signal(process, signal.SIGKILL)  # its children: they may keep the output open
    finally:
        with anyio.CancelScope(shield=True):
            await _end(process)
    text = output.decode(errors="replace")
    return text if process.returncode == 0 or too_much else f"{text}\n[exit code {process.returncode}]"


def _signal(process: Process, number: signal.Signals) -> None:
    """To the program and all that it has started, as far as they have stayed in its group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


async def _end(process: Process) -> None:
    if process.returncode is None:
        _signal(process, signal.SIGTERM)
        with anyio.move_on_after(_GRACE_S):
            await process.wait()
    _signal(process, signal.SIGKILL)
    await process.aclose()
