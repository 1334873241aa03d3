"""What is measured engine by engine, in rounds: starts, loads, prefill, decode, repeated text."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bench import Bench
from engine_llm_os import speculates
from environments import OURS, SPECULATING, Peer
from worker import Failed

TOKENS = {1: 56, 4: 32, 8: 24, 16: 16, 32: 16}  # decoded by each sequence in one sample
REPEATED = {"code": "repeat code", "prose": "repeat prose"}  # the shipped texts
_MB = 1e6


def decode_of(batch: int, context: int) -> str:
    return f"decode x{batch} at {context:,}"


def prefill_of(tokens: int) -> str:
    return f"prefill {tokens:,}"


def starts(bench: Bench) -> None:
    """Fresh processes; the import is timed within, the command from outside."""
    timed = "import time; t = time.perf_counter(); import llm_os; print(time.perf_counter() - t)"
    with bench.doing("import llm_os, llm-os --help"):
        for _ in range(max(3, 3 * bench.plan.rounds)):
            done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
            bench.results.add("import llm_os", "s", OURS.name, float(done.stdout))
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "llm_os", "--help"], capture_output=True, check=True)
            bench.results.add("llm-os --help", "s", OURS.name, time.perf_counter() - began)


def loads(bench: Bench) -> None:
    """Fresh processes: one with nothing in the page cache and nothing prepared, then some with both."""
    for number in range(bench.plan.rounds + 1):
        for peer in bench.turn(number):
            kind = "warm" if number else "cold"
            with bench.doing(f"{kind} load, {peer.name}"):
                if not number:
                    _forget(bench.file_of(peer))
                try:
                    _load(bench, peer, kind)
                except Failed as error:
                    bench.results.miss(f"load, {kind}", peer.name, str(error))


def _load(bench: Bench, peer: Peer, kind: str) -> None:
    worker = bench.start(peer)
    try:
        load_s = bench.load(worker, 1, 1024).seconds
        first_s = worker.ask("prefill", prompt=bench.prompts.fresh(128)).value
        worker.ask("prefill", prompt=bench.prompts.fresh(512))
        peak = worker.ask("decode", prompts=[bench.prompts.fresh(512)], tokens=32).peak
    finally:
        worker.close()
    add = bench.results.add
    add(f"load, {kind}", "s", peer.name, load_s)
    add(f"load to first token, {kind}", "s", peer.name, load_s + first_s)
    if kind == "warm":
        add("imports", "s", peer.name, worker.import_s)
        add("peak memory", "MB", peer.name, peak / _MB)
        add("peak memory, less imports", "MB", peer.name, (peak - worker.imported) / _MB)


def _forget(model: Path) -> None:
    """Drop a model's files from the page cache."""
    for file in [model] if model.is_file() else [each for each in model.rglob("*") if each.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def prefills(bench: Bench) -> None:
    """From the prompt to its first token, in a process that is warm; the shortest one as that time."""
    shortest = min(bench.plan.prefills)
    for number in range(bench.plan.rounds + 1):
        for tokens in bench.plan.prefills if number else [shortest]:
            measure = "first token of 128" if tokens == shortest else prefill_of(tokens)
            for peer in bench.turn(number):
                with bench.doing(f"{measure}, {peer.name}"):
                    seconds = bench.ask(peer, measure, "prefill", prompt=bench.prompts.fresh(tokens))
                if seconds is None or not number:  # the first round warms up
                    continue
                if tokens == shortest:
                    bench.results.add(measure, "ms", peer.name, 1000 * seconds)
                else:
                    bench.results.add(measure, "tokens/s", peer.name, tokens / seconds)


def decodes(bench: Bench) -> None:
    """Each context's prompts stay the same, so that engines find them computed after the first round. The long context
    takes most of a run: fewer tokens and a round less."""
    for context in bench.plan.contexts:
        prompts = [bench.prompts.fresh(context) for _ in range(max(bench.plan.batches))]
        long = context > min(bench.plan.contexts)
        for number in range(max(1, bench.plan.rounds - long)):
            for batch in bench.plan.batches:
                tokens = TOKENS[batch] // (2 if long else 1)
                measure = decode_of(batch, context)
                for peer in bench.turn(number):
                    with bench.doing(f"{measure}, {peer.name}"):
                        found = bench.ask(peer, measure, "decode", prompts=prompts[:batch], tokens=tokens)
                    if found is not None:
                        bench.results.add(measure, "tokens/s", peer.name, found["tokens"] / found["seconds"])


def repeated(bench: Bench) -> None:
    """Text that repeats itself, by this project with and without drafted tokens."""
    if not speculates():
        for measure in REPEATED.values():
            bench.results.miss(measure, SPECULATING.name, "no enabled plugin guesses what comes next")
        return
    for number in range(bench.plan.rounds):
        for text, measure in REPEATED.items():
            prompt = bench.prompts.repeated(text, 400)
            for peer in (OURS, SPECULATING) if number % 2 else (SPECULATING, OURS):
                with bench.doing(f"{measure}, {peer.name}"):
                    found = bench.ask(peer, measure, "decode", prompts=[prompt], tokens=96)
                if found is not None:
                    bench.results.add(measure, "tokens/s", peer.name, found["tokens"] / found["seconds"])
    bench.rest(SPECULATING)
