"""Guesses what comes next from what a process has read and written itself: quotations, edits, repetitions.

    … def area(self): return self.width * … def area(self): return │self.width * …
      └── the last tokens stood here before ──┘ └── what followed them then ──┘

Prompt lookup decoding (Saxena, 2023). Each pair of tokens is listed with where it ended last, and each place with the
one before it, as in LZ77: so a token costs a microsecond or two, however long the text. Of the latest places the one
is taken before which most tokens are alike. A long match is a better sign than a short one, so it gives more guesses.
A repetition runs on: what follows a place may be a guess itself. One process's text is never used for another's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from llm_os import Draft, DraftContext, RegisterDrafter, hookimpl

_PLACES = 4  # that are looked at
_ALIKE = 16  # tokens before a place that are compared at most
_STEP = 2048  # tokens that are listed at once: a long prompt is read over some steps
_WINDOW = 16384  # tokens that are remembered: some 3 MB


class PromptLookup:
    """The drafter."""

    def open(self, context: DraftContext) -> Draft:
        return Lookup()


class Lookup:
    """One process's text."""

    def __init__(self) -> None:
        self._forget(array("q"))

    def _forget(self, tokens: array[int]) -> None:
        """Begin with these tokens, none of them listed."""
        self._tokens = tokens
        self._latest: dict[int, int] = {}  # pair -> the place after it
        self._earlier = array("q", [0])  # place -> the one before it after the same pair; 0 is none

    def guess(self, new: Sequence[int], limit: int) -> Sequence[int]:
        self._tokens.extend(new)
        if len(self._tokens) > _WINDOW:
            self._forget(self._tokens[-_WINDOW // 2 :])
        self._list()
        place, alike = self._find()
        return self._from(place, min(limit, 2 * alike))

    def _list(self) -> None:
        """List more pairs, but never the last one: that is looked for."""
        tokens, latest, earlier = self._tokens, self._latest, self._earlier
        begin = len(earlier)
        for place in range(begin, min(len(tokens), begin + _STEP)):
            pair = tokens[place - 2] << 32 | tokens[place - 1] if place > 1 else -1
            earlier.append(latest.get(pair, 0))
            latest[pair] = place

    def _find(self) -> tuple[int, int]:
        """Where the last tokens stood before, and how many of them; (0, 0) if nowhere."""
        tokens, end = self._tokens, len(self._tokens)
        if end < 3:
            return 0, 0
        best = most = 0
        place = self._latest.get(tokens[end - 2] << 32 | tokens[end - 1], 0)
        for _ in range(_PLACES):
            if not place or most == _ALIKE:
                break
            alike = 2
            while alike < min(_ALIKE, place) and tokens[place - 1 - alike] == tokens[end - 1 - alike]:
                alike += 1
            if alike > most:
                best, most = place, alike
            place = self._earlier[place]
        return best, most

    def _from(self, place: int, count: int) -> list[int]:
        tokens, end = self._tokens, len(self._tokens)
        found: list[int] = []
        for at in range(place, place + count):
            found.append(tokens[at] if at < end else found[at - end])
        return found


@hookimpl
def register_drafters(register: RegisterDrafter) -> None:
    register("prompt_lookup", PromptLookup())
