"""OpenVINO GenAI: its continuous batching pipeline on the GGUF file itself, with its prefix cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai
from serve import window
from traffic import Wish, play

_SLACK = 8  # tokens that are answered beyond those measured: sequences do not begin in one step


class Engine:
    version = f"openvino-genai {openvino_genai.__version__}"

    def __init__(self) -> None:
        self._ids = 0
        self._filled: set[tuple[int, ...]] = set()

    def load(self, model: str, threads: int, sequences: int, context: int) -> None:
        config = openvino_genai.SchedulerConfig()
        config.max_num_seqs = sequences
        config.max_num_batched_tokens = 512
        config.enable_prefix_caching = True
        if sequences > 1:
            config.cache_size = 3  # GB; else the cache grows with what is asked of it
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, config, "CPU", properties)

    def prefill(self, prompt: list[int]) -> float:
        began = time.perf_counter()
        self._answer([prompt], 1)
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        for prompt in prompts:
            if tuple(prompt) not in self._filled:
                self._answer([prompt], 1)
                self._filled.add(tuple(prompt))
        return window(self._answer(prompts, tokens + _SLACK))

    def traffic(self, wishes: Sequence[Wish], bound: float) -> dict[str, Any]:
        for prefix in {tuple(wish[1][: wish[4]]) for wish in wishes}:
            self._answer([list(prefix)], 1)
        live: dict[int, Any] = {}
        counts: dict[int, int] = {}

        def admit(index: int, wish: Wish) -> None:
            live[index], counts[index] = self._add(wish[1], wish[2]), 0

        def step(done: Callable[[int, int], None]) -> bool:
            self._pipeline.step()
            for index, handle in list(live.items()):
                counts[index] += _read(handle)
                if counts[index] >= wishes[index][2]:
                    del live[index]
                    done(index, counts[index])
            return bool(live)

        played = play(wishes, bound, admit, step)
        for handle in live.values():
            handle.cancel()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return played

    def _answer(self, prompts: list[list[int]], tokens: int) -> list[list[tuple[float, int]]]:
        handles = [self._add(prompt, tokens) for prompt in prompts]
        events: list[list[tuple[float, int]]] = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter()
            for handle, each in zip(handles, events, strict=True):
                if count := _read(handle):
                    each.append((now, count))
        return events

    def _add(self, prompt: list[int], tokens: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        self._ids += 1
        return self._pipeline.add_request(self._ids, openvino.Tensor(np.array([prompt], np.int64)), config)


def _read(handle: Any) -> int:
    """Tokens that came since the last time."""
    return sum(len(output.generated_ids) for output in handle.read().values()) if handle.can_read() else 0
