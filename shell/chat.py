"""`llm-os chat`: a conversation. One turn's failure or Ctrl-C ends the turn, never the program."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import anyio
from cyclopts import Parameter

import llm_os
from llm_os.shell import signals
from llm_os.shell.answer import Answer, boot, checked, state, stream
from llm_os.shell.line_input import open_input
from llm_os.shell.options import ANSWER, TOOL, MachineOptions, SamplingOptions
from llm_os.shell.progress import Waiting, fetch
from llm_os.shell.stdio import say

if TYPE_CHECKING:
    from llm_os.shell.tools import Tools

_HELP = (
    "/set NAME VALUE   change how answers are sampled: /set temperature 0",
    "/set              show what was changed",
    "/clear            forget the conversation",
    "/bye              leave, as Ctrl-D does",
    "Alt-Enter, or a backslash at the end of a line, goes on with the next line. Ctrl-C stops an answer.",
)
_NUMBERS = {field.name: int if "int" in str(field.type) else float for field in fields(SamplingOptions)}
_NUMBERS.pop("stop")


def chat(
    model: str,
    /,
    *,
    system: Annotated[str | None, Parameter(group=ANSWER)] = None,
    tool: TOOL = (),
    sampling: SamplingOptions | None = None,
    machine: MachineOptions | None = None,
) -> None:
    """Talk with a model. Answers go to stdout; each line of a piped stdin is a message.

    Parameters
    ----------
    model
        As for llm-os run.
    system
        A message that tells the model how to behave.
    tool
        Let the model use it: module:function, or the name of a plugin's tool. You are asked before it runs.
    """
    options, config = sampling or SamplingOptions(), (machine or MachineOptions()).config()
    options.sampling()
    fetch(model, config)
    with Waiting("starting") as waiting, boot(config) as kernel:
        waiting.describe = lambda: state(kernel, model)
        anyio.run(kernel.load, model)
        waiting.stop()
        _converse(Conversation(kernel, model, options, system, tool))


def _converse(conversation: Conversation) -> None:
    lines = open_input()
    if not lines.interactive:
        while not conversation.over and (text := lines.read()) is not None:
            conversation.hear(text)
        return
    say(conversation.greeting())
    with signals.interrupts_raise():
        while not conversation.over:
            try:
                if (text := lines.read()) is None:
                    return
                conversation.hear(text)
                say("")
            except KeyboardInterrupt:  # it stopped what was going on, and has been dealt with there
                say("")


class Conversation:
    """What was said so far, and how the next answer is sampled."""

    def __init__(
        self,
        kernel: llm_os.Kernel,
        model: str,
        options: SamplingOptions,
        system: str | None,
        tools: tuple[str, ...] = (),
    ) -> None:
        self.over = False
        self._kernel = kernel
        self._model = model
        self._options = options
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, Any]] = []
        self._answer = Answer()
        self._tools: Tools | None = None
        if tools:
            from llm_os.shell.tools import Tools

            self._tools = Tools(kernel, tools)

    def greeting(self) -> str:
        info = next(info for info in self._kernel.models() if info.name == self._model)
        return f"{self._model}, context {info.context_length} tokens. /help for help, Ctrl-D to leave."

    def hear(self, text: str) -> None:
        """One message or command. An error of the kernel is told, and is not the end; Closed is raised.

        An answer that is interrupted stays in `messages` as far as it was shown.
        """
        try:
            if text.startswith("/"):
                self._command(*text[1:].split())
            elif text.strip():
                self._turn(text)
        except llm_os.Closed:
            raise
        except llm_os.Error as error:
            say(f"llm-os: {error}")

    def _turn(self, text: str) -> None:
        asked: list[dict[str, Any]] = [*self.messages, {"role": "user", "content": checked(text)}]
        shown: list[str] = []

        def write(piece: str) -> None:
            shown.append(piece)
            self._answer.write(piece)

        sampling = self._options.sampling()
        request = llm_os.Request(model=self._model, messages=[*self._system, *asked], sampling=sampling)
        waiting = Waiting("thinking")
        waiting.describe = lambda: state(self._kernel, self._model)
        more: list[dict[str, Any]] | None = None
        try:
            if self._tools is not None:
                ended = self._tools.answer(request, waiting, write)
                completion, more = ended.completion, ended.messages
            else:
                completion = stream(self._kernel, request, waiting, write)
            if completion.finish_reason == "length" and sampling.max_tokens is None:
                self._answer.end()
                say("llm-os: the conversation has filled the context; /clear begins a new one")
        except llm_os.RequestError as error:
            if not self.messages:
                raise
            say(f"llm-os: {error}; /clear begins a new conversation")
        finally:
            self._answer.end()
            if more is not None:
                self.messages = [*asked, *more]
            elif shown:
                self.messages = [*asked, {"role": "assistant", "content": "".join(shown)}]

    def _command(self, name: str = "", *words: str) -> None:
        match name, *words:
            case "bye" | "exit" | "quit", *_:
                self.over = True
            case ["clear"]:
                self.messages = []
                say("The conversation is forgotten.")
            case ["set"]:
                changed = [
                    f"{name} {value}" for name in _NUMBERS if (value := getattr(self._options, name)) is not None
                ]
                say(", ".join(changed) or f"Nothing was changed. There are: {', '.join(_NUMBERS)}.")
            case "set", option, *value:
                self._set(option, value)
            case "help", *_:
                for line in _HELP:
                    say(line)
            case _:
                say(f"llm-os: there is no command /{name}; /help lists them (a space before it makes it a message)")

    def _set(self, name: str, value: list[str]) -> None:
        if name not in _NUMBERS:
            near = difflib.get_close_matches(name, _NUMBERS, n=1, cutoff=0.5)
            raise llm_os.ConfigError(
                f"/set has no {name!r}; {f'did you mean {near[0]}?' if near else 'there are: ' + ', '.join(_NUMBERS)}"
            )
        number = _NUMBERS[name]
        try:
            changed: dict[str, Any] = {name: number(value[0]) if value else None}
        except ValueError:
            kind = "a whole number" if number is int else "a number"
            raise llm_os.ConfigError(f"{name} is {value[0]!r}; it must be {kind}") from None
        options = replace(self._options, **changed)
        options.sampling()
        self._options = options
