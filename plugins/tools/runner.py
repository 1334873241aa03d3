"""The loop of function calling: the model's turn, its calls, what they said, the model's next turn.

stream ──turn──> calls? ──no──> finish
   ^               │ yes      the process is held meanwhile (BLOCKED): it computes nothing, and its KV goes where
   └── unblock <── run        room is needed
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

from msgspec import Struct, structs

from llm_os import Completion, Kernel, Request, RequestError, Stream, Tool
from llm_os.plugins.tools.calls import Result, Toolbox
from llm_os.plugins.tools.parsers import FORMATS, Call
from llm_os.plugins.tools.permissions import Permissions
from llm_os.plugins.tools.schema import all_defused, definition, defused
from llm_os.plugins.tools.turns import Chat, Turn, call_id, safe_name, told

_SHORTEST = 256  # characters: what a tool said is cut to no less before the conversation ends for want of room


class Said(Struct, frozen=True):
    """A piece of the model's text, calls left out."""

    text: str


class Ended(Struct, frozen=True, kw_only=True):
    """The last event. `messages` are what this conversation has added: append them to ask further. No special token can
    come of them, though they go through the template: what a model says may be what a tool has said."""

    reason: Literal["stop", "length", "cancelled", "deadline", "rounds"]  # rounds: it would call for ever
    completion: Completion
    messages: list[dict[str, Any]]


Event = Said | Call | Result | Ended


async def converse(
    kernel: Kernel,
    request: Request,
    *,
    tools: Sequence[Tool] | None = None,
    permissions: Permissions | None = None,
    max_rounds: int = 8,
    format: str | None = None,
    stream: Stream | None = None,
) -> AsyncGenerator[Event, None]:
    """Answer a request whose model may use tools: pieces of text and calls as they come, results, and Ended.

    `tools` are those of the kernel's plugins by default. `permissions` are kept from one conversation to the next by
    whoever wants "session" to mean that; by default nobody can be asked, so only tools that need no permission run.
    After `max_rounds` turns with calls the conversation ends. `format` says how the model writes calls, of "hermes",
    "llama3" and "mistral"; by default its chat template does. `stream` goes on with a session of an earlier life
    (`kernel.attach`), whose request was this one: calls whose results it had not been given are made again.

    Leaving early (`aclose`, cancellation) ends the process and cancels tools that run. Raises what streams raise,
    RequestError for a raw prompt or unknown format, ConfigError for a tool that cannot be described.
    """
    if request.messages is None:
        raise RequestError("tools need messages; a raw prompt has no turns")
    if format is not None and format not in FORMATS:
        raise RequestError(f"format is {format!r}; there are: {', '.join(FORMATS)}")
    tools = kernel.tools if tools is None else tools
    toolbox = Toolbox(tools, permissions or Permissions())
    definitions = tuple(definition(tool) for tool in tools)
    request = structs.replace(request, tools=definitions, hold=True)
    with kernel.stream(request) if stream is None else stream as answer:
        conversation = _Conversation(kernel, request, toolbox, answer, format, max_rounds)
        async for event in conversation.events():
            yield event


class _Conversation:
    def __init__(
        self, kernel: Kernel, request: Request, toolbox: Toolbox, stream: Stream, format: str | None, max_rounds: int
    ) -> None:
        self._kernel = kernel
        self._request = request
        self._toolbox = toolbox
        self._stream = stream
        self._format = format
        self._rounds_left = max_rounds
        self._chat: Chat | None = None
        self._turn = Turn(FORMATS[format or "hermes"])
        self._calls = 0
        self._messages: list[dict[str, Any]] = []
        self._reason: Literal["length", "rounds"] | None = None

    async def events(self) -> AsyncGenerator[Event, None]:
        async for chunk in self._stream:
            chat = self._open()
            *earlier, text = [chunk.text] if chat is None else chat.turns(chunk)
            for turn in earlier:  # of an earlier life: their calls were made
                yield Said(self._turn.push(turn))
                _, calls = self._end_turn()
                self._rounds_left -= bool(calls)
            if shown := self._turn.push(text):
                yield Said(shown)
            if not chunk.waiting and chunk.finish_reason is None:
                continue
            if chunk.finish_reason is not None and self._reason is not None:
                break  # it was finished, its last turn is known
            rest, calls = self._end_turn()
            if rest:
                yield Said(rest)
            if chunk.finish_reason is not None:
                if calls:
                    self._reason = "length"  # there is no room to go on
            elif calls and self._rounds_left > 0 and chat is not None:
                self._rounds_left -= 1
                for call in calls:
                    yield call
                results = await self._run(calls)
                for result in results:
                    yield result
                await self._go_on(chat, results)
            else:
                if calls:
                    self._reason = "rounds"
                await self._kernel.finish(self._stream.pid)
                break
        async for _ in self._stream:
            continue
        completion = self._stream.completion
        assert completion is not None
        reason = self._reason or completion.finish_reason
        yield Ended(reason=reason, completion=completion, messages=self._messages)

    def _open(self) -> Chat | None:
        """None where the process has ended so soon that its model cannot be asked."""
        if self._chat is None:
            try:
                image = self._kernel.image(self._stream.pid)
            except RequestError:
                return None
            messages = self._request.messages or []
            self._chat = Chat(image, messages, self._request.tools, self._format)
            self._turn = Turn(self._chat.format)
        return self._chat

    def _end_turn(self) -> tuple[str, list[Call]]:
        """What is still to be shown of it, and its calls."""
        rest, text, calls = self._turn.finish()
        self._turn = Turn(self._chat.format if self._chat else FORMATS["hermes"])
        calls = [structs.replace(call, id=call_id(self._calls + index)) for index, call in enumerate(calls)]
        self._calls += len(calls)
        message: dict[str, Any] = {"role": "assistant", "content": self._defused(text)}
        if calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {"name": safe_name(call), "arguments": all_defused(call.arguments)},
                }
                for call in calls
            ]
        if text or calls:
            self._messages.append(message)
        return rest, calls

    def _defused(self, text: str) -> str:
        return defused(text) if self._chat is None else self._chat.defused(text)

    async def _run(self, calls: list[Call]) -> list[Result]:
        await self._kernel.block(self._stream.pid, self._toolbox.expected_s(calls))
        return await self._toolbox.run(calls)

    async def _go_on(self, chat: Chat, results: list[Result]) -> None:
        """Tell the model, in as many words as there is room for."""
        longest = max(len(result.text) for result in results)
        while True:
            texts = [told(_cut(result.text, longest), result.error) for result in results]
            tokens = chat.after([(result.call, text) for result, text in zip(results, texts, strict=True)])
            try:
                await self._kernel.unblock(self._stream.pid, tokens)
            except RequestError:
                if not any(info.pid == self._stream.pid for info in self._kernel.ps()):
                    return  # it has ended: its stream says why
                if longest <= _SHORTEST:
                    self._reason = "length"
                    await self._kernel.finish(self._stream.pid)
                    return
                longest = max(_SHORTEST, longest // 2)
            else:
                break
        for result, text in zip(results, texts, strict=True):
            said = {"role": "tool", "tool_call_id": result.call.id, "name": safe_name(result.call)}
            self._messages.append({**said, "content": chat.defused(text)})


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}\n[{len(text) - longest} more characters were cut off]"
