"""`--tool` at the command line: the person at the terminal is asked; without one nothing is permitted."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = """
from pathlib import Path

def note(text: str) -> str:
    '''Write a note.'''
    Path("note.txt").write_text(text)
    return "written"
"""
SCRIPT = """
def script(conversation):
    turns = conversation.count("<|im_start|>assistant")
    if turns % 2:
        return "It said: " + conversation.rpartition("<|im_start|>tool\\n")[2].partition("<|im_end|>")[0]
    return '<tool_call>{"name": "note", "arguments": {"text": "\\u001b[2Khello"}}</tool_call>'
"""


@pytest.fixture
def command(scripted: Callable[..., object], tmp_path: Path) -> tuple[list[str], dict[str, str], Path]:
    """A program whose model wants to write a note; its environment, and where it runs."""
    site, home = tmp_path / "site", tmp_path / "work"
    home.mkdir()
    (home / "mine.py").write_text(TOOLS)
    plugin = site / "scripted_plugin" / "__init__.py"
    plugin.write_text(
        plugin.read_text().replace('def script(conversation):\n    raise AssertionError("the test gives one")', SCRIPT)
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLM_OS_")}
    environment = inherited | {
        "PYTHONPATH": str(site),
        "LLM_OS_HOME": str(tmp_path / "home"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "TERM": "dumb",
    }
    enable = [sys.executable, "-m", "llm_os", "plugins", "enable", "scripted_plugin", "--yes"]
    subprocess.run(enable, env=environment, check=True, capture_output=True, cwd=home)
    machine = ["--driver", "scripted", "--memory", "64MiB"]
    run = [sys.executable, "-m", "llm_os", "run", "scripted:a", "hello", "--tool", "mine:note", *machine]
    return run, environment, home


def test_without_a_terminal_nothing_is_permitted(command: tuple[list[str], dict[str, str], Path]) -> None:
    run, environment, home = command
    done = subprocess.run(run, env=environment, cwd=home, input="o\no\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nobody to ask" in done.stdout and "nobody to ask" in done.stderr
    assert not (home / "note.txt").exists()


@pytest.mark.parametrize(("answer", "permitted"), [("o\n", True), ("\n", False), ("no way\n", False)])
def test_the_person_at_the_terminal_decides(
    command: tuple[list[str], dict[str, str], Path], answer: str, permitted: bool
) -> None:
    run, environment, home = command
    ours, theirs = pty.openpty()
    process = subprocess.Popen(run, env=environment, cwd=home, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    try:
        shown = b""
        while b"[N]o:" not in shown:
            assert select.select([ours], [], [], 60)[0], shown
            shown += os.read(ours, 4096)
        assert b'"text": "\\u001b[2Khello"' in shown and b"The model asks for note" in shown  # escaped, and whole
        assert not (home / "note.txt").exists()
        os.write(ours, answer.encode())
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
    assert process.returncode == 0
    assert (b"It said: written" in out) is permitted
    assert (home / "note.txt").exists() is permitted
