"""Conversations with tools, on a real kernel with a scripted model: turns, results, limits, company."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest

import llm_os
from llm_os.plugins.tools import Call, Ended, Permissions, Result, Rule, Said, converse, make_tool

Boot = Callable[..., llm_os.Kernel]
ALLOWED = Permissions([Rule(decision="allow")])


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def turns(*answers: str) -> Callable[[str], str]:
    """A model that says these things, one each turn, whatever it is told."""
    return lambda conversation: answers[min(conversation.count("<|im_start|>assistant"), len(answers) - 1)]


def heard(conversation: str) -> str:
    """What the last turn before the model's says."""
    return conversation.rpartition("<|im_start|>tool\n")[2].partition("<|im_end|>")[0]


def ask(text: str = "hello", **fields: Any) -> llm_os.Request:
    return llm_os.Request(model="scripted:a", messages=[{"role": "user", "content": text}], **fields)


def talk(kernel: llm_os.Kernel, request: llm_os.Request | None = None, **options: Any) -> list[Any]:
    async def main() -> list[Any]:
        return [event async for event in converse(kernel, request or ask(), **options)]

    return anyio.run(main)


def said(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, Said))


def results(events: list[Any]) -> list[Result]:
    return [event for event in events if isinstance(event, Result)]


def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


async def shout(text: str) -> str:
    """In capitals."""
    await anyio.lowlevel.checkpoint()
    return text.upper()


TOOLS = [make_tool(double), make_tool(shout)]


def test_what_a_tool_said_is_what_the_model_goes_on_from(scripted: Boot) -> None:
    kernel = scripted(
        lambda text: (
            f"It is {heard(text)}." if "<|im_start|>tool\n" in text else f"Let me see. {call('double', number=21)}"
        )
    )
    events = talk(kernel, tools=TOOLS, permissions=ALLOWED)
    assert said(events) == "Let me see. It is 42."
    [asked] = [event for event in events if isinstance(event, Call)]
    [result] = results(events)
    assert (asked.name, asked.arguments, result.text, result.error) == ("double", {"number": 21}, "42", False)
    ended = events[-1]
    assert isinstance(ended, Ended) and ended.reason == "stop"
    assert [message["role"] for message in ended.messages] == ["assistant", "tool", "assistant"]
    assert ended.messages[0]["tool_calls"][0]["function"] == {"name": "double", "arguments": {"number": 21}}
    assert kernel.ps() == []


def test_calls_of_one_turn_run_side_by_side_and_are_answered_in_order(scripted: Boot) -> None:
    both = threading.Barrier(2, timeout=30)

    def meet(who: str) -> str:
        """Waits for the other one."""
        both.wait()
        return who

    kernel = scripted(turns(call("meet", who="one") + call("meet", who="two"), "done"))
    events = talk(kernel, tools=[make_tool(meet)], permissions=ALLOWED)
    assert [result.text for result in results(events)] == ["one", "two"]


def test_mistakes_of_the_model_are_told_to_it_and_run_nothing(scripted: Boot) -> None:
    script = turns(
        call("double", number="a lot")
        + call("treble", number=1)
        + "<tool_call>{oops</tool_call>"
        + call("double", n=1),
        "sorry",
    )
    events = talk(scripted(script), tools=TOOLS, permissions=ALLOWED)
    texts = [result.text for result in results(events)]
    assert all(result.error for result in results(events)) and len(texts) == 4
    assert "number is 'a lot'; it must be of type integer" in texts[0]
    assert "there is no tool 'treble'; there are: double, shout" in texts[1]
    assert "no valid JSON" in texts[2]
    assert "number is missing" in texts[3]
    assert said(events) == "sorry"


def test_a_tool_that_fails_is_told_to_the_model(scripted: Boot) -> None:
    def broken() -> str:
        """Fails."""
        raise OSError("no such bus")

    def leave() -> str:
        """Wants to end the program."""
        raise SystemExit(3)

    def odd() -> object:
        """Says what cannot be said."""
        return object()

    kernel = scripted(turns(call("broken") + call("leave") + call("odd"), "oh"))
    events = talk(kernel, tools=[make_tool(tool) for tool in (broken, leave, odd)], permissions=ALLOWED)
    texts = [result.text for result in results(events)]
    assert "no such bus" in texts[0] and "SystemExit" in texts[1] and "neither text nor JSON" in texts[2]
    assert events[-1].reason == "stop"


def test_output_is_cut_at_its_limit_and_time_at_its_own(scripted: Boot) -> None:
    release = threading.Event()

    def chatter() -> str:
        """Says much."""
        return "x" * 1000

    def hang() -> None:
        """Never returns by itself."""
        release.wait()

    async def wait() -> None:
        """Never returns."""
        await anyio.sleep_forever()

    tools = [make_tool(chatter, output_limit=10), make_tool(hang, timeout_s=0.01), make_tool(wait, timeout_s=0.01)]
    kernel = scripted(turns(call("chatter") + call("hang") + call("wait"), "done"))
    texts = [result.text for result in results(talk(kernel, tools=tools, permissions=ALLOWED))]
    assert texts[0] == "xxxxxxxxxx\n[990 more characters were cut off]"
    assert texts[1] == texts[2] == "it took longer than 0.01 s and was stopped"
    release.set()


def test_threads_that_were_left_behind_are_counted(scripted: Boot) -> None:
    release, begun = threading.Event(), []

    def hang() -> None:
        """Never returns by itself."""
        begun.append(1)
        release.wait()

    kernel = scripted(turns(*[call("hang")] * 6, "done"))
    events = talk(kernel, tools=[make_tool(hang, timeout_s=0.01)], permissions=ALLOWED)
    assert "4 earlier calls of it have not ended yet" in results(events)[-1].text
    assert len(begun) == 4
    release.set()


def test_a_model_that_would_call_for_ever_is_ended(scripted: Boot) -> None:
    events = talk(scripted(turns(call("double", number=1))), tools=TOOLS, permissions=ALLOWED, max_rounds=3)
    assert len(results(events)) == 3 and events[-1].reason == "rounds"
    assert events[-1].completion.finish_reason == "stop"


def test_what_does_not_fit_the_context_is_cut_further(scripted: Boot) -> None:
    def book() -> str:
        """Long."""
        return "word " * 20_000

    kernel = scripted(lambda text: f"{len(heard(text))}" if "<|im_start|>tool\n" in text else call("book"))
    events = talk(kernel, tools=[make_tool(book, output_limit=10**6)], permissions=ALLOWED)
    assert events[-1].reason == "stop" and 16_000 < int(said(events)) < 65_536


def test_a_turn_without_room_for_the_next_one_ends_with_length(scripted: Boot) -> None:
    text = call("double", number=1)
    request = ask(sampling=llm_os.Sampling(max_tokens=len(text) + 1))
    events = talk(scripted(turns(text)), request, tools=TOOLS, permissions=ALLOWED)
    assert events[-1].reason == "length" and results(events) == []


def test_tools_of_plugins_are_there_by_default_and_need_no_permission_where_they_say_so(scripted: Boot) -> None:
    def script(text: str) -> str:
        return heard(text) if "<|im_start|>tool\n" in text else call("calculator", expression="2**10")

    assert "there is no tool 'calculator'" in said(talk(scripted(script)))  # the plugin is not enabled
    config = llm_os.Config(driver="scripted", plugins=("scripted_plugin", "tools"))
    with llm_os.Kernel(config) as other:
        assert [tool.name for tool in other.tools] == ["calculator", "current_time"]
        assert said(talk(other)) == "1024"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_cancelling_a_conversation_cancels_its_tools_and_ends_its_process(scripted: Boot, backend: str) -> None:
    kernel = scripted(turns(call("wait"), "never"))
    seen: list[Any] = []

    async def main() -> None:
        async def wait() -> None:
            """Waits for ever."""
            seen.append(kernel.ps()[0])
            scope.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                seen.append("cancelled")

        with anyio.CancelScope() as scope:
            async for _ in converse(kernel, ask(), tools=[make_tool(wait)], permissions=ALLOWED):
                pass
        await kernel.kill(seen[0].pid)  # after what the reader's leaving has asked for

    anyio.run(main, backend=backend)
    assert seen[0].state == "blocked" and seen[1:] == ["cancelled"]
    assert kernel.ps() == []


def test_others_are_served_while_a_tool_takes_its_time_and_its_pages_go_when_memory_is_short(scripted: Boot) -> None:
    begun, release = threading.Event(), threading.Event()

    def slow() -> str:
        """As long as the test likes."""
        begun.set()
        release.wait()
        return "at last"

    def script(text: str) -> str:
        if "hello" in text:
            return f"I heard: {heard(text)}" if "<|im_start|>tool\n" in text else call("slow")
        return "y" * 1400

    kernel = scripted(script, memory="4MiB", swap_host="16MiB", prefix_cache=False)
    question = ask("hello" + "z" * 1500)
    tools = [make_tool(slow, timeout_s=3600, expected_s=10.0)]
    events: list[Any] = []

    async def conversation() -> None:
        events.extend([event async for event in converse(kernel, question, tools=tools, permissions=ALLOWED)])

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(conversation)
            await anyio.to_thread.run_sync(begun.wait)
            [held] = kernel.ps()
            assert held.state == "blocked" and held.computed_tokens > 1500 and kernel.memory().host == 0
            answers: list[str] = []

            async def other(name: str) -> None:
                answers.append((await kernel.generate(ask(name))).text)

            async with anyio.create_task_group() as crowd:
                for index in range(6):
                    crowd.start_soon(other, f"other {index}")
            assert answers == ["y" * 1400] * 6
            [still] = kernel.ps()
            assert still.pid == held.pid and still.state == "blocked" and not release.is_set()
            assert kernel.memory().host > 0 or still.computed_tokens < held.computed_tokens
            release.set()

    anyio.run(main)
    alone = talk(scripted(script), question, tools=tools, permissions=ALLOWED)
    assert said(events) == said(alone) == "I heard: at last"
    assert events[-1].completion.token_ids == alone[-1].completion.token_ids
