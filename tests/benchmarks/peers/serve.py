"""The worker's side: one engine in a process of its own, asked in JSON lines. Standard library only.

    ENVIRONMENT/bin/python serve.py ENGINE THREADS

A request is {"do": method, ...arguments} on stdin, its answer one line on stdout. Knows nothing of what is compared:
`engine_ENGINE.py` beside this file holds a class Engine with these methods.

    load(model, threads, sequences, context)    make ready for so many sequences of so many tokens
    prefill(prompt) -> seconds                  from the prompt to its first token
    decode(prompts, tokens) -> Window           prompts of one length, continued greedily by `tokens` each
    traffic(wishes, bound) -> Played            requests that come at their times; see traffic.py
    score(texts, top) -> scores                 optional: log-probabilities of given tokens
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _SIGKILL = 1, 9


def window(events: Sequence[Sequence[tuple[float, int]]]) -> dict[str, Any]:
    """Tokens and seconds while every sequence was decoding: after the last one's first token, until one ended.

    `events` are (time, tokens that came then), for each sequence in order. Raises RuntimeError if that never was.
    """
    begin, end = max(each[0][0] for each in events), min(each[-1][0] for each in events)
    tokens = sum(count for each in events for when, count in each if begin < when <= end)
    if end <= begin or tokens < len(events):
        raise RuntimeError("the sequences did not decode side by side: one ended before another began")
    return {"tokens": tokens, "seconds": end - begin}


def memory() -> dict[str, int]:
    """Bytes that this process has and the most that it had, as the machine counts them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[field].split()[0]) * 1024 for name, field in (("now", "VmRSS"), ("peak", "VmHWM"))}


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)  # a stopped process would not see its stdin end
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    began = time.perf_counter()
    engine = importlib.import_module(f"engine_{name}").Engine()
    _send(replies, {"import_s": time.perf_counter() - began, "version": engine.version, "memory": memory()})
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        try:
            value = getattr(engine, request.pop("do"))(**request)
            _send(replies, {"value": value, "seconds": time.perf_counter() - began, "memory": memory()})
        except Exception as error:  # the runner says what could not be measured, and why
            traceback.print_exc()
            _send(replies, {"error": f"{type(error).__name__}: {error}"})


def _send(replies: Any, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
