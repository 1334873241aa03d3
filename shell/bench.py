"""`llm-os bench`: how fast a model is on this machine. The figures to stdout, how far it is to stderr."""

from __future__ import annotations

import json as json_text
import re
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Group, Parameter

import llm_os
from llm_os.shell import signals
from llm_os.shell.figures import Found, report, text
from llm_os.shell.measure import SLACK, Figure, Subject, peak_bytes, start
from llm_os.shell.options import FLAG, MachineOptions
from llm_os.shell.progress import Waiting, bar, fetch
from llm_os.shell.stdio import printable, say

_MEASURED = Parameter(group=Group("What is measured", sort_key=1))
_MOST_NUMBERS = 16
_LARGEST = 2**24


@dataclass(frozen=True)
class Plan:
    """What is to be measured. `given` are the options of these that were not left to us."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    tokens: int
    rounds: int
    given: frozenset[str]


def bench(
    model: str,
    /,
    *,
    batch: Annotated[str | None, _MEASURED] = None,
    context: Annotated[str | None, _MEASURED] = None,
    prompt_tokens: Annotated[str | None, _MEASURED] = None,
    tokens: Annotated[int | None, _MEASURED] = None,
    rounds: Annotated[int | None, _MEASURED] = None,
    quick: Annotated[bool, FLAG, _MEASURED] = False,
    json: Annotated[bool, FLAG] = False,
    machine: MachineOptions | None = None,
) -> None:
    """Measure how fast a model is on this machine: loading, prompts, answers alone and together, memory.

    Parameters
    ----------
    model
        As for llm-os run.
    batch
        How many answers at the same time, with commas between; not given, 1,4,8,16,32.
    context
        Lengths of the prompts of these answers, in tokens; not given, 128,1024.
    prompt_tokens
        Lengths of the prompts whose reading is timed; not given, 512,2048.
    tokens
        How many tokens of each answer are timed; not given, 64.
    rounds
        How often it is measured; medians are shown. Not given, 3.
    quick
        Not given otherwise: batches 1,8, context 128, a prompt of 512 tokens, 32 tokens, 1 round.
    json
        Print one JSON object.
    """
    config = (machine or MachineOptions()).config(speculation="off")
    options = {"--batch": batch, "--context": context, "--prompt-tokens": prompt_tokens}
    plan = Plan(
        batches=_numbers("--batch", batch, config.batch_size) or ((1, 8) if quick else (1, 4, 8, 16, 32)),
        contexts=_numbers("--context", context) or ((128,) if quick else (128, 1024)),
        prompts=_numbers("--prompt-tokens", prompt_tokens) or ((512,) if quick else (512, 2048)),
        tokens=_number("--tokens", tokens, 32 if quick else 64),
        rounds=_number("--rounds", rounds, 1 if quick else 3),
        given=frozenset(name for name, value in options.items() if value is not None),
    )
    fetch(model, config)
    with Waiting("starting") as waiting:
        found = _measure(model, config, plan, waiting)
        with signals.abrupt():
            device = _device(config)
    if json:
        print(json_text.dumps(report(model, config, found, device)))
    else:
        for line in text(model, config, found, device):
            print(printable(line))
    for reason in found.left_out:
        say(f"llm-os: left out: {reason}")


class _Steps:
    """How far it is, for who waits."""

    def __init__(self, waiting: Waiting, count: int) -> None:
        self._count = count
        self._done = 0
        self._waiting = waiting

    def next(self, what: str) -> None:
        drawn = bar(self._done / self._count)
        self._done += 1
        self._waiting.describe = lambda: f"{drawn}  {what}"


def _measure(model: str, config: llm_os.Config, plan: Plan, waiting: Waiting) -> Found:
    """Raises RequestError and Refused for what was asked for and does not fit, and what kernels and streams raise."""
    found = Found(plan.tokens, plan.rounds)
    with signals.abrupt():
        image = llm_os.open_image(model, config)
    with closing(image):
        contexts = _that_fit("--context", plan.contexts, plan.tokens + SLACK, image, plan, found)
        prompts = _that_fit("--prompt-tokens", plan.prompts, 1, image, plan, found)
        answers = len(contexts) * (1 + plan.rounds * len(plan.batches))
        steps = _Steps(waiting, 2 + plan.rounds * len(prompts) + answers)
        steps.next(f"loading {model}")
        kernel, load = start(config, model)
        kernel.close()
        found.loads.append(load)
        steps.next(f"loading {model} again")
        kernel, load = start(config, model)
        found.loads.append(load)
        with kernel:
            subject = Subject(kernel, config, image, model)
            _time_prompts(subject, prompts, plan, found, steps)
            for context in contexts:
                _time_answers(subject, context, plan, found, steps)
            info = next(each for each in kernel.models() if each.name == model)
            found.weights, found.kv_bytes_per_token = info.weights, info.kv_bytes_per_token
            found.peak_bytes = peak_bytes()
    return found


def _time_prompts(subject: Subject, lengths: list[int], plan: Plan, found: Found, steps: _Steps) -> None:
    lengths = [each for each in lengths if _there_is_room(subject, "--prompt-tokens", 1, each, plan, found)]
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for turn in range(plan.rounds):
        for length in lengths:
            steps.next(f"a prompt of {length:,} tokens, round {turn + 1} of {plan.rounds}")
            times[length].append(subject.prefill(length))
    found.prompts = {length: Figure(tuple(seconds)) for length, seconds in times.items()}


def _time_answers(subject: Subject, context: int, plan: Plan, found: Found, steps: _Steps) -> None:
    """Rounds go through all batches in turn, so that what slows the machine for a while slows no batch more than the
    others."""
    batches = [each for each in plan.batches if _there_is_room(subject, "--context", each, context, plan, found)]
    prompts = [subject.prompt(context) for _ in range(max(batches, default=0))]
    steps.next(f"reading {len(prompts)} prompts of {context:,} tokens")
    subject.read(prompts)
    speeds: dict[int, list[float]] = {batch: [] for batch in batches}
    for turn in range(plan.rounds):
        for batch in batches:
            steps.next(f"batch {batch}, context {context:,}, round {turn + 1} of {plan.rounds}")
            speeds[batch].append(subject.decode(prompts[:batch], plan.tokens))
    found.answers |= {(batch, context): Figure(tuple(each)) for batch, each in speeds.items()}


def _that_fit(
    option: str, lengths: tuple[int, ...], more: int, image: llm_os.Image, plan: Plan, found: Found
) -> list[int]:
    """Those of `lengths` that leave room for `more` tokens. Raises RequestError for one that was asked for."""
    fitting = [length for length in lengths if length + more <= image.context_length]
    for length in lengths:
        if length not in fitting:
            reason = (
                f"{option} {length} and {more} tokens more do not fit the context of {image.name}, which is "
                f"{image.context_length}"
            )
            if option in plan.given:
                raise llm_os.RequestError(f"{reason}; give at most {max(0, image.context_length - more)}")
            found.left_out.append(reason)
    return fitting


def _there_is_room(subject: Subject, option: str, count: int, length: int, plan: Plan, found: Found) -> bool:
    """Raises Refused where there is none for what was asked for."""
    alone = option == "--prompt-tokens"
    shortage = subject.shortage(count, length + (1 if alone else plan.tokens + SLACK))
    if shortage is None:
        return True
    reason = f"{f'a prompt of {length}' if alone else f'batch {count}, context {length}'} {shortage}"
    if option in plan.given or (not alone and "--batch" in plan.given):
        raise llm_os.Refused(f"{reason}; raise --memory or ask for less")
    found.left_out.append(reason)
    return False


def _numbers(option: str, text: str | None, most: int = _LARGEST) -> tuple[int, ...]:
    """Those in `text`, each once, in order; none if it is not given. Raises RequestError."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > _MOST_NUMBERS or not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise llm_os.RequestError(
            f"{option} is {text[:100]!r}; write numbers with commas between, such as 1,8, at most {_MOST_NUMBERS}"
        )
    return tuple(sorted({_number(option, int(part), 1, most) for part in parts}))


def _number(option: str, value: int | None, otherwise: int, most: int = _LARGEST) -> int:
    """Raises RequestError."""
    if value is None:
        return otherwise
    if not 1 <= value <= most:
        raise llm_os.RequestError(f"{option} is {value}; it must be from 1 to {most}")
    return value


def _device(config: llm_os.Config) -> llm_os.DeviceInfo | None:
    """What the kernel ran on: `auto` is cuda where it can be used, else cpu."""
    there = {info.driver: info for info in llm_os.probe(config) if info.unavailable is None}
    return there.get("cuda", there.get("cpu")) if config.driver == "auto" else there.get(config.driver)
