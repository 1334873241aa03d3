"""llm-os, through its facade only: what a host that embeds it would call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Literal

from serve import window
from traffic import Watch, Wish

import llm_os

_SLACK = 8  # tokens that are answered beyond those measured: sequences do not begin in one step


class Engine:
    version = f"llm-os {llm_os.__version__}"
    speculation = False

    def __init__(self) -> None:
        llm_os.probe()  # imports the drivers, torch among them: this is an import, not a load
        self._filled: set[tuple[int, ...]] = set()

    def load(self, model: str, threads: int, sequences: int, context: int) -> None:
        self._model, self._threads = model, threads
        speculation: Literal["auto", "off"] = "auto" if self.speculation else "off"
        self._kernel = llm_os.Kernel(llm_os.Config(driver="cpu", threads=threads, speculation=speculation))
        asyncio.run(self._kernel.load(model))

    def prefill(self, prompt: list[int]) -> float:
        began = time.perf_counter()
        self._kernel.stream(self._request(prompt, 1)).result()
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        for prompt in prompts:
            if tuple(prompt) not in self._filled:
                self._kernel.stream(self._request(prompt, 1)).result()
                self._filled.add(tuple(prompt))
        requests = [self._request(prompt, tokens + _SLACK) for prompt in prompts]
        return window(asyncio.run(self._all(requests)))

    def traffic(self, wishes: Sequence[Wish], bound: float) -> dict[str, Any]:
        for prefix in {tuple(wish[1][: wish[4]]) for wish in wishes}:
            self._kernel.stream(self._request(list(prefix), 1)).result()
        return asyncio.run(self._play(wishes, bound))

    def score(self, texts: list[list[int]], top: int, precision: Literal["fast", "exact"] = "fast") -> list[list[Any]]:
        config = llm_os.Config(driver="cpu", threads=self._threads, precision=precision)
        scores = llm_os.score(self._model, texts, top=top, config=config)
        return [[[token.logprob, token.top] for token in text] for text in scores.texts]

    def _request(self, prompt: list[int], tokens: int) -> llm_os.Request:
        sampling = llm_os.Sampling(max_tokens=tokens, temperature=0, repetition_penalty=1.0)
        return llm_os.Request(model=self._model, prompt=prompt, sampling=sampling)

    async def _all(self, requests: list[llm_os.Request]) -> list[list[tuple[float, int]]]:
        return await asyncio.gather(*(self._events(stream) for stream in map(self._kernel.stream, requests)))

    async def _events(self, stream: llm_os.Stream) -> list[tuple[float, int]]:
        return [(time.perf_counter(), len(chunk.token_ids)) async for chunk in stream if chunk.token_ids]

    async def _play(self, wishes: Sequence[Wish], bound: float) -> dict[str, Any]:
        watch = Watch(wishes, bound)

        async def one(index: int, wish: Wish) -> None:
            await asyncio.sleep(wish[0] - watch.now())
            completion = await self._kernel.generate(self._request(wish[1], wish[2]))
            watch.done(index, len(completion.token_ids))

        tasks = [asyncio.create_task(one(index, wish)) for index, wish in enumerate(wishes)]
        while not all(task.done() for task in tasks) and not watch.lost():
            await asyncio.wait(tasks, timeout=0.1)
        played = watch.played()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return played


def speculates() -> bool:
    """Whether an enabled plugin guesses what comes next."""
    return any("register_drafters" in each.hooks for each in llm_os.enabled_plugins())
