"""A kernel that is killed while a tool runs: the next one holds the conversation where it was, and goes on with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

import llm_os
from llm_os.plugins.tools import Call, Ended, Permissions, Result, Rule, Said, converse, make_tool

CALL = '<tool_call>{"name": "look", "arguments": {"at": "%s"}}</tool_call>'

PROGRAM = """
import sys, time
import anyio
sys.path[:0] = sys.argv[1:3]
import scripted_plugin, test_crash
import llm_os
from llm_os.plugins.tools import converse, make_tool

def look(at: str) -> str:
    '''Looks.'''
    if at == "there":
        print("begun", flush=True)
        time.sleep(3600)
    return f"nothing {at}"

async def main():
    scripted_plugin.script = test_crash.script
    with llm_os.Kernel(test_crash.config(sys.argv[3])) as kernel:
        tools, permissions = [make_tool(look)], test_crash.ALLOWED
        async for event in converse(kernel, test_crash.REQUEST, tools=tools, permissions=permissions):
            pass

anyio.run(main)
"""

REQUEST = llm_os.Request(
    model="scripted:a", messages=[{"role": "user", "content": "hello"}], sampling=llm_os.Sampling(seed=1)
)
ALLOWED = Permissions([Rule(decision="allow")])


def script(text: str) -> str:
    """Looks here, then there, then says what it has seen."""
    turns = text.count("<|im_start|>assistant")
    if turns < 2:
        return f"I look. {CALL % ('here', 'there')[turns]}"
    return "I saw: " + ", ".join(part.partition("<|im_end|>")[0] for part in text.split("<|im_start|>tool\n")[1:])


def config(folder: str) -> llm_os.Config:
    return llm_os.Config(
        driver="scripted", plugins=("scripted_plugin",), memory="64MiB", frame_size="64KiB", state=Path(folder)
    )


def look(at: str) -> str:
    """Looks."""
    return f"nothing {at}"


def test_a_conversation_goes_on_in_the_next_life_where_its_tool_was_running(
    scripted: Callable[..., llm_os.Kernel], tmp_path: Path
) -> None:
    async def talk(kernel: llm_os.Kernel, **options: Any) -> list[Any]:
        tools = [make_tool(look)]
        return [e async for e in converse(kernel, REQUEST, tools=tools, permissions=ALLOWED, **options)]

    undisturbed = anyio.run(talk, scripted(script))
    state, site = tmp_path / "state", tmp_path / "site"
    life = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(site), os.fspath(Path(__file__).parent), str(state)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert life.stdout is not None and life.stdout.readline() == "begun\n"
    finally:
        life.kill()
        life.wait()
        assert life.stdout is not None
        life.stdout.close()

    kernel = scripted(script, state=state)
    [pid] = kernel.recovered

    async def go_on() -> list[Any]:
        stream = kernel.attach(pid)
        waiting = [info for info in kernel.ps() if info.pid == pid]
        assert [info.state for info in waiting] in (["blocked"], ["new"], ["loading"], ["ready"])
        return await talk(kernel, stream=stream)

    events = anyio.run(go_on)
    made = [event.arguments for event in events if isinstance(event, Call)]
    assert made == [{"at": "there"}]  # the one that had no result; not the one before it
    assert [event.text for event in events if isinstance(event, Result)] == ["nothing there"]
    for kind in (Said, Ended):
        assert any(isinstance(event, kind) for event in events)
    assert said(events) == said(undisturbed) == "I look. I look. I saw: nothing here, nothing there"
    assert events[-1].completion.token_ids == undisturbed[-1].completion.token_ids
    anyio.run(kernel.kill, pid)
    kernel.close()
    later = scripted(script, state=state)
    assert later.recovered == ()  # it has been read to its end


def said(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, Said))
