"""Kernels that are killed at any moment, and the next ones on the same state directory: nothing acknowledged is lost,
and every session goes on as if nothing had happened. `LLM_OS_TEST_KILLS=300` makes it longer."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

import anyio
import pytest

import llm_os
from llm_os.drivers.sim import Lone, SimImage
from llm_os.kernel.driver import Sample
from llm_os.kernel.process import salt_of
from llm_os.kernel.random import uniform

KILLS = int(os.environ.get("LLM_OS_TEST_KILLS", "30"))
A, B = "sim:a?layers=2&kv_bytes_per_token=8192", "sim:b?layers=2&kv_bytes_per_token=8192"
GIFT = list(b" the tool said 42 ")
PROMPT = "The quick brown fox jumps over the lazy dog. "

Say = Callable[..., None]  # say(what, pid, *values): durable knowledge of the world outside


def config(folder: Path) -> llm_os.Config:
    """Two models of which one fits at a time, and KV for less than half of the processes."""
    return llm_os.Config(
        driver="sim",
        memory="4MiB",
        frame_size="64KiB",
        slice_s=0.002,
        batch_tokens=64,
        swap_host="256KiB",
        swap_disk="2MiB",
        state=folder,
    )


# key: model, seed, max_tokens, what it does; the order is that of the pids
SCRIPT: dict[str, tuple[str, int, int, str]] = {
    "long": (A, 11, 120, "answer"),
    "longer": (B, 12, 150, "answer"),
    "tool": (B, 13, 60, "tool"),
    "another tool": (A, 14, 60, "tool"),
    "parent": (A, 15, 70, "fork"),
    "samples": (B, 100, 40, "samples"),
    "short": (A, 17, 5, "answer"),
}


def request(key: str) -> llm_os.Request:
    model, seed, max_tokens, _ = SCRIPT[key]
    sampling = llm_os.Sampling(max_tokens=max_tokens, temperature=1.0, seed=seed, logprobs=1)
    return llm_os.Request(model=model, prompt=PROMPT + key, sampling=sampling)


# -- in the process that is killed -----------------------------------------------------------------------------------


class Life:
    """One life of the program around a kernel."""

    def __init__(self, kernel: llm_os.Kernel, say: Say) -> None:
        self.kernel = kernel
        self.say = say

    async def first(self) -> None:
        async with anyio.create_task_group() as tasks:
            for key, (*_, action) in SCRIPT.items():
                if action == "samples":
                    for index, stream in enumerate(self.kernel.samples(request(key), 3)):
                        self.start(tasks, stream, key, index)
                else:
                    self.start(tasks, self.kernel.stream(request(key)), key, 0)

    async def next(self, pids: Mapping[int, tuple[str, int]], asked: set[int], given: set[int]) -> None:
        """`asked` are those that wait for a tool, `given` those that have had its answer, as far as anybody knows."""
        self.say("recovered", 0, self.kernel.recovered)
        async with anyio.create_task_group() as tasks:
            for pid in self.kernel.recovered:
                key, _ = pids[pid]
                tasks.start_soon(self.read, self.kernel.attach(pid))
                if SCRIPT[key][3] == "tool" and pid not in given:
                    tasks.start_soon(self.answer if pid in asked else self.ask, pid)

    def start(self, tasks: Any, stream: llm_os.Stream, key: str, index: int) -> None:
        self.say("started", stream.pid, key, index)
        tasks.start_soon(self.read, stream, tasks, key if index == 0 else None)

    async def read(self, stream: llm_os.Stream, tasks: Any = None, key: str | None = None) -> None:
        acknowledge, action = stream._acknowledge, SCRIPT[key][3] if key else ""

        def last() -> None:
            self.say("has it all", stream.pid)
            acknowledge()

        stream._acknowledge = last
        heard = 0
        async for chunk in stream:
            self.say("heard", stream.pid, chunk.token_ids)
            assert [entry.token_id for entry in chunk.logprobs] == list(chunk.token_ids)
            heard += len(chunk.token_ids)
            if action == "tool" and heard >= 5:
                tasks.start_soon(self.ask, stream.pid)
                action = ""
            elif action == "fork" and heard >= 7:
                tasks.start_soon(self.fork, tasks, stream.pid)
                action = ""
        assert stream.completion is not None
        assert stream.completion.usage.completion_tokens == len(stream.completion.logprobs)
        self.say("ended", stream.pid, stream.completion.token_ids, stream.completion.seed)

    async def fork(self, tasks: Any, parent: int) -> None:
        child = self.kernel.fork(parent)
        self.say("started", child.pid, "parent", 1)
        try:
            await self.read(child)
        except llm_os.RequestError as error:
            assert "has ended" in str(error)  # the parent was quicker

    async def ask(self, pid: int) -> None:
        try:
            await self.kernel.block(pid)
        except llm_os.RequestError as error:
            if "already" not in str(error):
                return  # it has ended
        self.say("asked", pid)
        await self.answer(pid)

    async def answer(self, pid: int) -> None:
        try:
            await self.kernel.unblock(pid, GIFT)
        except llm_os.RequestError as error:
            assert "not blocked" in str(error) or "no process" in str(error)  # it has had it, and nobody heard of that
        self.say("given", pid)


def live(folder: Path, say: Say, book: Book) -> None:
    async def main() -> None:
        async with llm_os.Kernel(config(folder)) as kernel:
            life = Life(kernel, say)
            if book.lives == 0:
                await life.first()
            else:
                await life.next(book.pids, book.asked, book.given)

    anyio.run(main)


def live_on_smollm2(folder: Path, say: Say, book: Book) -> None:
    """Two answers; when both are there, the kernel is asked the same again by somebody who shares no KV with them."""
    settings = llm_os.Config(driver="cpu", precision="exact", memory="800MiB", threads=1, state=folder)

    async def main() -> None:
        async with llm_os.Kernel(settings) as kernel, anyio.create_task_group() as tasks:
            life = Life(kernel, say)
            if book.lives == 0:
                for key in QUESTIONS:
                    life.start(tasks, kernel.stream(question(key, "")), key, 0)
            else:
                await life.next(book.pids, set(), set())
                again = {key: kernel.stream(question(key, "somebody else")) for key in QUESTIONS}
                for key, stream in again.items():
                    say("expected", 0, key, (await stream.collect()).token_ids)

    anyio.run(main)


QUESTIONS = {"long": "Once upon a time, in a small village by the sea,", "longer": "def fibonacci(n):\n"}


def question(key: str, tenant: str) -> llm_os.Request:
    sampling = llm_os.Sampling(max_tokens=20, temperature=0.8, seed=7, logprobs=0)
    model = os.environ["LLM_OS_TEST_SMOLLM2"]
    return llm_os.Request(model=model, prompt=QUESTIONS[key], sampling=sampling, tenant=tenant)


Live = Callable[[Path, Say, "Book"], None]

# -- in the process that kills ---------------------------------------------------------------------------------------


class Book:
    """What the world outside knows of one state directory."""

    def __init__(self) -> None:
        self.pids: dict[int, tuple[str, int]] = {}  # key and index
        self.heard: dict[int, list[list[int]]] = {}  # one list for each life
        self.asked: set[int] = set()
        self.given: set[int] = set()
        self.whole: set[int] = set()
        self.ended: dict[int, tuple[list[int], int]] = {}  # tokens and seed
        self.expected: dict[str, list[int]] = {}  # by key, what a kernel answered that was not killed meanwhile
        self.lives = self.kills = 0

    def read(self, line: bytes) -> None:
        what, pid, *values = json.loads(line)
        match what:
            case "started":
                self.pids[pid] = (values[0], values[1])
            case "recovered":
                self.check_recovered(values[0])
            case "heard":
                lists = self.heard.setdefault(pid, [])
                lists.extend([] for _ in range(self.lives - len(lists)))
                lists[-1] += values[0]
            case "asked":
                self.asked.add(pid)
            case "given":
                self.given.add(pid)
            case "has it all":
                self.whole.add(pid)
            case "expected":
                self.expected[values[0]] = values[1]
            case "ended":
                assert self.ended.setdefault(pid, (values[0], values[1])) == (values[0], values[1])

    def check_recovered(self, pids: list[int]) -> None:
        known = {pid for pid, heard in self.heard.items() if any(heard)} | self.asked | self.given
        assert known - self.whole <= set(pids), f"lost: {known - self.whole - set(pids)}"
        assert set(pids) <= self.pids.keys()

    def check(self) -> int:
        """Every answer is the one of a kernel that was never killed; what was heard in each life is its beginning.
        Returns how many there are."""
        for pid, (tokens, seed) in self.ended.items():
            starts = self.check_answer(pid, tokens, seed)
            for life, heard in enumerate(self.heard[pid]):
                at = starts if life == 0 else [0]
                assert any(tokens[start : start + len(heard)] == heard for start in at), f"{pid} said something else"
        for pid, lives in self.heard.items():
            assert pid in self.ended or not any(lives) or pid in self.whole, f"{pid} never ended"
        return len(self.ended)

    def check_answer(self, pid: int, tokens: list[int], seed: int) -> list[int]:
        """Where what was heard in its first life may begin."""
        key, index = self.pids[pid]
        if self.expected:
            assert tokens == self.expected[key], f"{pid} answered something else"
            return [0]
        model, first, length, action = SCRIPT[key]
        prompt, size = list((PROMPT + key).encode()), range(length + 1)
        assert len(tokens) == length
        if action == "tool":
            given = [n for n in size if tokens == alone(model, prompt, length, seed, gift_at=n)]
            assert given if pid in self.asked else given or tokens == alone(model, prompt, length, seed)
        elif action == "fork" and index:
            starts = [n for n in size if tokens == alone(model, prompt, length, seed, before=first, until=n)]
            assert starts, f"{pid} is no fork of its parent"
            return starts
        else:
            assert seed == first + index
            assert tokens == alone(model, prompt, length, seed), f"{pid} answered something else"
        return [0]


def alone(
    model: str, prompt: list[int], length: int, seed: int, gift_at: int = -1, before: int = 0, until: int = 0
) -> list[int]:
    """The answer of a process that has the machine to itself: with the seed `before` up to `until`, given GIFT after
    `gift_at` tokens."""

    def tokens() -> Iterator[int]:
        process = Lone(SimImage.parse(model), salt_of(""), prompt)
        for said in count():
            if said == gift_at:
                for token in GIFT:
                    process.feed(token)
            drawn = uniform(before if said < until else seed, process.fed)
            token = process.next(Sample(uniform=drawn, temperature=1.0))
            yield token
            process.feed(token)

    return list(islice(tokens(), length))


def in_a_life(folder: Path, book: Book, tell: int, live: Live) -> None:
    """What the child does; never returns."""

    def say(what: str, pid: int, *values: Any) -> None:
        os.write(tell, json.dumps([what, pid, *values]).encode() + b"\n")

    signal.alarm(60)  # rather than wait for ever
    try:
        live(folder, say, book)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run_life(
    folder: Path, book: Book, chance: random.Random | None, live: Live = live, least: int = 0, most: int = 300
) -> bool:
    """One life; killed when `chance` says so, after it has told from `least` to `most` things, if that long. True if it
    came to its end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        in_a_life(folder, book, writer, live)
    os.close(writer)
    book.lives += 1
    data = b""
    if chance is not None:
        lines = max(least, chance.choice((0, 1, 10, most // 3, most)))
        enough = chance.randint(least, lines)
        while data.count(b"\n") < enough and (more := os.read(reader, 4096)):
            data += more
        time.sleep(chance.random() * (0.05 if lines == 0 else 0.002))  # which moment, is all that this decides
        os.kill(child, signal.SIGKILL)
    while more := os.read(reader, 65536):
        data += more
    os.close(reader)
    _, status = os.waitpid(child, 0)
    for line in data.splitlines():
        book.read(line)
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, f"life {book.lives} in {folder} failed"
    assert not killed or chance is not None, f"life {book.lives} in {folder} never ended"
    book.kills += killed
    return not killed


def kill_at_any_moment(folder: Path, kills: int) -> str:
    """Many state directories, each with one to four lives, of which the last one is left alone."""
    done = lives = answers = tokens = directories = given = 0
    while done < kills:
        directories += 1
        chance, book, state = random.Random(directories), Book(), folder / str(directories)
        for _ in range(chance.choice((1, 1, 2, 3))):
            if run_life(state, book, chance):
                break
        run_life(state, book, None)
        answers += book.check()
        tokens += sum(len(heard) for lists in book.heard.values() for heard in lists)
        given += len(book.given)
        done, lives = done + book.kills, lives + book.lives
    return (
        f"{done} kills in {lives} lives on {directories} state directories: {answers} answers equal, {given} of tools, "
        f"{tokens} tokens acknowledged"
    )


def kill_with_smollm2(folder: Path, kills: int) -> str:
    """As above, with a model that takes seconds to load."""
    done = directories = answers = 0
    while done < kills:
        directories += 1
        chance, book, state = random.Random(directories), Book(), folder / str(directories)
        while book.kills < min(3, kills - done) and not run_life(state, book, chance, live_on_smollm2, 3, 30):
            pass
        run_life(state, book, None, live_on_smollm2)
        answers += book.check()
        done += max(1, book.kills)
    return f"{done} kills on {directories} state directories: {answers} answers equal"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_session_goes_on_after_kill_9_at_any_moment_as_if_it_had_not_been_killed(
    tmp_path: Path, in_a_process: Any
) -> None:
    print(in_a_process(kill_at_any_moment, tmp_path, KILLS))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_real_model_goes_on_after_kill_9_with_the_tokens_that_it_would_have_said(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_a_process: Any
) -> None:
    monkeypatch.setenv("LLM_OS_TEST_SMOLLM2", str(smollm2))
    print(in_a_process(kill_with_smollm2, tmp_path, 20 if KILLS > 30 else 1))
