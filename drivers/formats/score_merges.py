"""SentencePiece-style encoding: of all neighbours that form a token, the pair with the best-scored token merges first.

The `tokenizers` library ranks *pairs*; llama.cpp scores the *result*, equal scores go by position, and any two
neighbours may form it. Text comes with spaces already written as U+2581. Knows nothing of special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

_CACHED_WORDS = 1 << 14
_CACHED_LENGTH = 32


class ScoreMerges:
    """Encodes text with a scored vocabulary; characters that are in no token become byte tokens (or `unknown`)."""

    def __init__(self, tokens: Sequence[str], scores: Sequence[float], unknown: int | None) -> None:
        self._ids = {text: token for token, text in enumerate(tokens)}
        self._scores = scores
        self._longest = max(map(len, tokens), default=0)
        # No token holds these two characters side by side: no merge ever crosses, and both sides stand alone.
        self._neighbours = {pair for text in tokens for pair in pairwise(text)}
        fallback = () if unknown is None else (unknown,)
        self._bytes = [self._byte(byte, fallback) for byte in range(256)]
        self._short = lru_cache(maxsize=_CACHED_WORDS)(self._merge)

    def _byte(self, byte: int, fallback: tuple[int, ...]) -> tuple[int, ...]:
        token = self._ids.get(f"<0x{byte:02X}>")
        if token is None and byte < 128:
            token = self._ids.get(chr(byte))
        return fallback if token is None else (token,)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; O(n log n) in its length."""
        ids: list[int] = []
        start = 0
        for end, pair in enumerate(pairwise(text), start=1):
            if pair not in self._neighbours:
                ids += self._word(text[start:end])
                start = end
        if text:
            ids += self._word(text[start:])
        return ids

    def _word(self, word: str) -> tuple[int, ...]:
        return self._short(word) if len(word) <= _CACHED_LENGTH else self._merge(word)

    def _merge(self, text: str) -> tuple[int, ...]:
        # Symbol i is text[i:ends[i]], and ends[i] is 0 once it has become part of the symbol before it. The right
        # neighbour of i begins where i ends.
        size = len(text)
        ends = list(range(1, size + 1))
        before = list(range(-1, size - 1))
        ids, scores, longest = self._ids, self._scores, self._longest
        queue = [(-scores[token], i, i + 2) for i in range(size - 1) if (token := ids.get(text[i : i + 2])) is not None]
        heapify(queue)
        while queue:
            _, left, end = heappop(queue)
            middle = ends[left]
            if not 0 < middle < end or ends[middle] != end:
                continue  # one of the two has changed since
            ends[left], ends[middle] = end, 0
            if end < size:
                before[end] = left
                if (after := ends[end]) - left <= longest and (token := ids.get(text[left:after])) is not None:
                    heappush(queue, (-scores[token], left, after))
            if (start := before[left]) >= 0 and end - start <= longest:
                token = ids.get(text[start:end])
                if token is not None:
                    heappush(queue, (-scores[token], start, end))
        merged: list[int] = []
        at = 0
        while at < size:
            end = ends[at]
            token = ids.get(text[at:end])
            if token is None:  # one character: only tokens come from merges
                for byte in text[at:end].encode("utf-8"):
                    merged += self._bytes[byte]
            else:
                merged.append(token)
            at = end
        return tuple(merged)
