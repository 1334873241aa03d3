"""CTranslate2, int8: static batches, for it has no continuous batching; a batch's shared context is a static prompt.

Token ids are its tokens' names (convert_ctranslate2.py), so nothing is lost on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ctranslate2
import numpy as np
from serve import window
from traffic import Wish, play


class Engine:
    version = f"ctranslate2 {ctranslate2.__version__}"

    def load(self, model: str, threads: int, sequences: int, context: int) -> None:
        self._generator = ctranslate2.Generator(model, compute_type="int8", inter_threads=1, intra_threads=threads)
        self._sequences = sequences

    def prefill(self, prompt: list[int]) -> float:
        began = time.perf_counter()
        self._generate([prompt], 1)
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """All sequences continue the first prompt: only a static prompt's KV is kept from one batch to the next."""
        context, last = prompts[0][:-1], prompts[0][-1]
        self._generate([[last]], 1, static=context)
        return window(self._generate([[last]] * len(prompts), tokens + 1, static=context))

    def traffic(self, wishes: Sequence[Wish], bound: float) -> dict[str, Any]:
        """Whatever waits is the next batch; an answer is done when its last token is, not when its batch is."""
        waiting: list[int] = []

        def admit(index: int, wish: Wish) -> None:
            waiting.append(index)

        def step(done: Callable[[int, int], None]) -> bool:
            batch = waiting[: self._sequences]
            del waiting[: len(batch)]
            lengths = [wishes[index][2] for index in batch]
            prompts = [wishes[index][1] for index in batch]
            self._generate(prompts, max(lengths), lengths, lambda row: done(batch[row], lengths[row]))
            return bool(waiting)

        return play(wishes, bound, admit, step)

    def score(self, texts: list[list[int]], top: int) -> list[list[Any]]:
        found = []
        for text in texts:
            output = self._generator.forward_batch([_names(text[:-1])], return_log_probs=True)
            logprobs = np.array(output, dtype=np.float32)[0].astype(np.float64)
            found.append([_score(row, token, top) for row, token in zip(logprobs, text[1:], strict=True)])
        return found

    def _generate(
        self,
        prompts: list[list[int]],
        tokens: int,
        lengths: list[int] | None = None,
        done: Callable[[int], None] | None = None,
        static: list[int] | None = None,
    ) -> list[list[tuple[float, int]]]:
        """When each token of each prompt came. Prompts end at their own `lengths`, if there are any."""
        events: list[list[tuple[float, int]]] = [[] for _ in prompts]

        def on_token(result: Any) -> bool:
            row = result.batch_id
            events[row].append((time.perf_counter(), 1))
            ends = lengths is not None and len(events[row]) == lengths[row]
            if ends and done is not None:
                done(row)
            return ends

        self._generator.generate_batch(
            [_names(prompt) for prompt in prompts],
            static_prompt=_names(static) if static else None,
            include_prompt_in_result=False,
            min_length=tokens,
            max_length=tokens,
            callback=on_token,
        )
        return events


def _names(ids: list[int]) -> list[str]:
    return [str(token) for token in ids]


def _score(logprobs: Any, token: int, top: int) -> Any:
    best = np.argsort(-logprobs, kind="stable")[:top]
    return [float(logprobs[token]), [(int(each), float(logprobs[each])) for each in best]]
