"""Programs as tools: arguments stay arguments, and what runs too long or says too much is ended with its children."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import anyio
import msgspec
import pytest

import llm_os
from llm_os.plugins.tools import Permissions, Rule, program
from llm_os.plugins.tools.calls import Result, Toolbox
from llm_os.plugins.tools.parsers import Call


def run(tool: llm_os.Tool, **arguments: Any) -> Result:
    toolbox = Toolbox([tool], Permissions([Rule(decision="allow")]))
    [result] = anyio.run(toolbox.run, [Call(id="call00000", name=tool.name, arguments=arguments)])
    return result


def python(folder: Path, code: str, *more: str, **options: Any) -> llm_os.Tool:
    parameters: Mapping[str, Any] = options.pop("parameters", {"x": str})
    return program("t", "A program.", [sys.executable, "-c", code, *more], parameters, folder=folder, **options)


ECHO = "import sys; print(sys.argv[1:])"


@pytest.mark.parametrize("evil", ["a; touch m", "$(touch m)", "`touch m`", "a b", "'", '"', "a\nb", "{x}", "*"])
def test_an_argument_is_one_argument_whatever_is_in_it(tmp_path: Path, evil: str) -> None:
    result = run(python(tmp_path, ECHO, "{x}", "say={x}"), x=evil)
    assert result.text == f"{[evil, f'say={evil}']}\n" and not result.error
    assert list(tmp_path.iterdir()) == []


def test_an_argument_cannot_become_an_option(tmp_path: Path) -> None:
    assert "would be an option" in run(python(tmp_path, ECHO, "{x}"), x="--delete").text
    assert run(python(tmp_path, ECHO, "--", "{x}"), x="--delete").text == "['--', '--delete']\n"
    assert run(python(tmp_path, ECHO, "--x={x}"), x="--delete").text == "['--x=--delete']\n"
    assert "NUL" in run(python(tmp_path, ECHO, "{x}"), x="a\0b").text


def test_types_are_checked_before_it_runs(tmp_path: Path) -> None:
    tool = python(tmp_path, ECHO, "{n}", "{kind}", parameters={"n": int, "kind": Literal["a", "b"]})
    assert run(tool, n=3, kind="b").text == "['3', 'b']\n"
    assert "n is 'x'" in run(tool, n="x", kind="a").text
    assert "kind is 'c'" in run(tool, n=1, kind="c").text


def test_it_runs_in_its_folder_with_no_more_of_the_environment_than_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "hush")
    code = "import os, sys; print(os.getcwd(), sorted(os.environ), sys.stdin.read())"
    text = run(python(tmp_path, code, parameters={}, environment={"LANG": "C.UTF-8"})).text
    assert str(tmp_path) in text and "SECRET_KEY" not in text and "hush" not in text and "'LANG'" in text
    assert "HOME" not in text and "'PATH'" in text


def test_its_failure_is_told(tmp_path: Path) -> None:
    text = run(python(tmp_path, "import sys; print('out'); sys.exit('no such thing')", parameters={})).text
    assert "no such thing" in text and "out" in text and "[exit code 1]" in text
    missing = program("t", "None.", ["no-such-program-here"], {}, folder=tmp_path)
    assert "no-such-program-here" in run(missing).text and run(missing).error


CHILDREN = (
    "import os, subprocess, sys, time; from pathlib import Path; "
    "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(3600)'], stdout=subprocess.PIPE); "
    "child.stdout.readline(); "
    "Path('pids').write_text(f'{os.getpid()} {child.pid}'); os.rename('pids', 'ready'); "
)


def gone(pid: int) -> bool:
    """It has ended, or does so at this moment."""
    try:
        file = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([file], [], [], 20)[0])
    finally:
        os.close(file)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux only")
def test_what_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    tool = python(tmp_path, CHILDREN + "time.sleep(3600)", parameters={}, timeout_s=1.5)
    result = run(tool)
    assert result.error and "it took longer than 1.5 s" in result.text
    assert all(gone(int(pid)) for pid in (tmp_path / "ready").read_text().split())


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux only")
def test_children_do_not_outlive_a_program_that_ends(tmp_path: Path) -> None:
    result = run(python(tmp_path, CHILDREN + "os._exit(0)", parameters={}))
    assert not result.error
    assert all(gone(int(pid)) for pid in (tmp_path / "ready").read_text().split())


def test_what_says_too_much_is_ended(tmp_path: Path) -> None:
    code = "import sys\nwhile True: sys.stdout.write('x' * 1000)"
    text = run(python(tmp_path, code, parameters={}, output_limit=100)).text
    assert text.startswith("x" * 100 + "\n[") and "more characters were cut off]" in text


def test_the_class_of_its_arguments_is_the_command_line(tmp_path: Path) -> None:
    tool = python(tmp_path, "pass", "{x}")
    assert tool.argument_class is not None
    assert msgspec.json.decode(tool.argument_class({"x": "a b"}))[-1] == "a b"
    allowed = Permissions([Rule(what='*"safe"*', decision="allow")])
    assert anyio.run(allowed.check, tool, {"x": "safe"}) is None
    assert anyio.run(allowed.check, tool, {"x": "other"}) is not None


@pytest.mark.parametrize(
    ("command", "parameters", "message"),
    [
        ([], {}, "must begin with the name of a program"),
        (["{x}"], {"x": str}, "must begin with the name of a program"),
        (["ls", "{y}"], {"x": str}, "has {y}, which is none of its parameters"),
    ],
)
def test_commands_that_make_no_sense_are_refused(
    tmp_path: Path, command: list[str], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(llm_os.ConfigError, match=message):
        program("t", "d", command, parameters, folder=tmp_path)
    with pytest.raises(llm_os.ConfigError, match="no folder"):
        program("t", "d", ["ls"], {}, folder=tmp_path / os.fspath("missing"))
