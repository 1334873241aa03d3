"""What `llm-os bench` measures, one thing at a time, by a clock on the caller's side of the kernel.

Knows kernels and clocks; does not know options or tables. Seconds, tokens a second, bytes.

    decode   streams   |prompt|. . . . .|= = = = = = = = =|. .      between the first token of the last stream to begin
                       |prompt   |. . . |= = = = = = = = =|.   .    and the `tokens`th after it, all of them run: what
                       |prompt       |. |= = = = = = = = =|         they answer in that time, the kernel has counted
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

import anyio

import llm_os
from llm_os.shell import signals
from llm_os.shell.answer import boot

_NEVER = -1000.0  # the least logit bias there is
SLACK = 64  # tokens that answers go on at least, so that none ends while another has still to be measured
_BEYOND = 1024  # and at most: what comes after the measurement is not waited for
_OPENING = "The capital of France is"
_WORDS = (
    ("old", "small", "bright", "quiet", "northern", "careful", "wooden", "distant", "young", "heavy", "common", "late"),
    ("river", "teacher", "engine", "letter", "village", "garden", "question", "winter", "market", "captain", "theory"),
    ("carries", "answers", "measures", "follows", "builds", "describes", "remembers", "crosses", "explains", "loses"),
    ("past", "before", "under", "without", "beside", "after", "against", "through", "behind", "toward", "despite"),
)


@dataclass(frozen=True)
class Figure:
    """One figure in all rounds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.rounds)

    @property
    def spread(self) -> float:
        """Half of what lies between the least and the most, as a share of the median."""
        return (max(self.rounds) - min(self.rounds)) / 2 / self.median


@dataclass(frozen=True)
class Load:
    """One way from nothing to a first token."""

    start_s: float  # until the kernel is there; the first one imports what it needs
    load_s: float  # until the model is on the device
    first_token_s: float  # from the request to its first token
    peak_bytes: int  # of the process so far


def start(config: llm_os.Config, model: str) -> tuple[llm_os.Kernel, Load]:
    """A kernel with `model` on its device, which has answered once. Raises what kernels and streams raise."""
    begun = time.perf_counter()
    kernel = boot(config)
    try:
        there = time.perf_counter()
        anyio.run(kernel.load, model)
        loaded = time.perf_counter()
        sampling = llm_os.Sampling(max_tokens=2, temperature=0)
        with kernel.stream(llm_os.Request(model=model, prompt=_OPENING, sampling=sampling)) as stream:
            next(stream)
            first = time.perf_counter()
            stream.result()
    except BaseException:
        kernel.close()
        raise
    return kernel, Load(there - begun, loaded - there, first - loaded, peak_bytes())


class Subject:
    """A model on a kernel that does nothing else. Its prompts begin differently, so that none is in the prefix cache by
    way of another."""

    def __init__(self, kernel: llm_os.Kernel, config: llm_os.Config, image: llm_os.Image, model: str) -> None:
        self._kernel = kernel
        self._config = config
        self._image = image
        self._model = model
        self._made = 0
        self._bias: dict[int, float] = {}

    def prompt(self, length: int) -> list[int]:
        """Ids of `length` tokens of plain sentences that nobody has seen."""
        self._made += 1
        text, ids = [f"{self._made}"], list[int]()
        random = Random(self._made)  # noqa: S311 - for variety, not for secrets
        while len(ids) < length:
            for _ in range(length // 8 + 1):
                adjective, noun, verb, preposition = (random.choice(words) for words in _WORDS)
                text.append(f"The {adjective} {noun} {verb} what {random.choice(_WORDS[1])} it is {preposition}.")
            ids = self._image.encode(" ".join(text), raw=True)
        return ids[:length]

    def shortage(self, count: int, tokens: int) -> str | None:
        """Why `count` processes of `tokens` tokens each cannot run at the same time; None if they can."""
        page_tokens, pages = self._pages()
        needed = count * -(-tokens // page_tokens)
        if needed <= pages:
            return None
        return f"needs KV for {needed * page_tokens} tokens, and memory has room for {pages * page_tokens}"

    def _pages(self) -> tuple[int, int]:
        """Tokens of a page, and how many pages the model has room for."""
        info = next(each for each in self._kernel.models() if each.name == self._model)
        memory, frame = self._kernel.memory(), self._config.frame_bytes
        frames = (memory.total - memory.weights - memory.workspace) // frame
        return info.page_tokens, frames * (frame // (info.page_tokens * info.kv_bytes_per_token))

    def prefill(self, length: int) -> float:
        """Seconds from a request with a prompt of `length` tokens to its first token."""
        request = self._request(self.prompt(length), 1)
        begun = time.perf_counter()
        with self._kernel.stream(request) as stream:
            next(stream)
            seconds = time.perf_counter() - begun
            stream.result()
        signals.check()
        return seconds

    def read(self, prompts: Iterable[list[int]]) -> None:
        """Put prompts into the prefix cache: answers to them begin at once from then on."""
        with ExitStack() as running:
            for stream in [running.enter_context(self._kernel.stream(self._request(each, 1))) for each in prompts]:
                stream.result()
                signals.check()

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Tokens a second of all answers together, over `tokens` of each or so. Raises Refused where they do not run at
        the same time."""
        speed = self._decode(prompts, tokens)
        if speed is None:  # an answer came to its end: from now on none may
            self._bias = dict.fromkeys(self._image.text_end_tokens, _NEVER)
            speed = self._decode(prompts, tokens)
        if speed is None:
            raise llm_os.Refused(
                f"{len(prompts)} answers of {self._model} to prompts of {len(prompts[0])} tokens are not all there at "
                f"the same time for {tokens} tokens; give a smaller --batch or --tokens"
            )
        return speed

    def _decode(self, prompts: list[list[int]], tokens: int) -> float | None:
        """None if one of them ended too early."""
        page_tokens, pages = self._pages()
        most = min(tokens + _BEYOND, min(self._image.context_length, pages * page_tokens) - len(prompts[0]))
        with ExitStack() as running:
            requests = [self._request(prompt, most) for prompt in prompts]
            streams = [running.enter_context(self._kernel.stream(request)) for request in requests]
            for stream in streams:
                chunk = next(stream)
                signals.check()
            begun, before = time.perf_counter(), self._counts()
            last = streams[-1]
            left = before.get(last.pid, most) + tokens - len(chunk.token_ids)  # the reader may be behind
            for chunk in last:
                signals.check()
                left -= len(chunk.token_ids)
                if left <= 0:
                    break
            ended, after = time.perf_counter(), self._counts()
            if any(stream.pid not in before or stream.pid not in after for stream in streams):
                return None
            return sum(after[stream.pid] - before[stream.pid] for stream in streams) / (ended - begun)

    def _counts(self) -> dict[int, int]:
        return {process.pid: process.completion_tokens for process in self._kernel.ps()}

    def _request(self, prompt: list[int], most: int) -> llm_os.Request:
        sampling = llm_os.Sampling(max_tokens=most, temperature=0, repetition_penalty=1, logit_bias=self._bias)
        return llm_os.Request(model=self._model, prompt=prompt, sampling=sampling)


def peak_bytes() -> int:
    """The most physical memory that this process has had, code and mapped files included."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(
                "VmHWM:"
            ):  # of this program alone; what getrusage says may be of the one that started it
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
