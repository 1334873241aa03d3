"""Prompts as token ids, cut from the texts that the project ships: real words, and no two prompts begin alike."""

from __future__ import annotations

import itertools
import random

import llm_os
from llm_os.plugins.quantize.report import shipped_texts, windows

_STRIDE = 613  # from one prompt's beginning to the next one's, in tokens; prime, so that all places get their turn


class Prompts:
    """Of one model. Knows its tokenizer, not its weights."""

    def __init__(self, model: str) -> None:
        image = llm_os.open_image(model)
        try:
            self.texts = {name: image.encode(text, raw=True) for name, text in shipped_texts().items()}
        finally:
            image.close()
        self._tokens = [token for ids in self.texts.values() for token in ids]
        self._places = itertools.count(1)

    def fresh(self, length: int) -> list[int]:
        """One that was not there before, so that no prefix cache knows it."""
        place = next(self._places) * _STRIDE % len(self._tokens)
        turned = [*self._tokens[place:], *self._tokens[:place]]
        return [*turned, *turned][:length]

    def repeated(self, text: str, length: int) -> list[int]:
        """A shipped text and its beginning once more: a model goes on quoting it."""
        ids = self.texts[text][:length]
        return [*ids, *ids[: length // 4]]

    def to_score(self, positions: int) -> list[list[int]]:
        return [ids for _, ids in windows(self.texts, positions)]

    def wishes(self, rate: float, seconds: float, seed: int) -> list[list[object]]:
        """A mixed load: Poisson arrivals, `rate` a second; see traffic.py for what a wish is. The same seed wishes the
        same at every rate, in fresh words; an infinite rate is all at once, as many as `seconds`."""
        draw = random.Random(seed)
        shared = [self.fresh(256) for _ in range(4)]
        count, now, wishes = (round(seconds), 0.0, []) if rate == float("inf") else (round(rate * seconds), 0.0, [])
        for _ in range(max(1, count)):
            now += draw.expovariate(1) / rate
            prefix, own, answer = draw.randrange(4), draw.randint(16, 112), draw.randint(16, 96)
            wishes.append([now, [*shared[prefix], *self.fresh(own)], answer, prefix, 256])
        return wishes
