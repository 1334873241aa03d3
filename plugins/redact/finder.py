"""Personal data in one text: where it is, and of which kind. Knows no placeholders' numbers and no conversation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from llm_os.plugins.redact import options, recognizers
from llm_os.plugins.redact.folding import Folder
from llm_os.plugins.redact.options import LITERAL, Options
from llm_os.plugins.redact.recognizers import KINDS, Recognizer

MAX_NUMBER = 6  # digits of a placeholder's number


class Span(NamedTuple):
    """`text[start:end]` is personal data."""

    start: int
    end: int
    kind: str


class Finder:
    """What one kernel looks for. Immutable; any thread may use it. Raises ConfigError."""

    def __init__(self, chosen: Options) -> None:
        self._folder = Folder()
        self._allowed = {value.casefold() for value in chosen.allow}
        extra = options.compile_patterns(chosen.patterns)
        self._recognizers: list[Recognizer] = [recognizers.own(kind, pattern) for kind, pattern in extra.items()]
        self._recognizers += [each for each in recognizers.built_in() if each.kind in chosen.kinds]
        self.kinds = (*extra, *(kind for kind in KINDS if kind in chosen.kinds), LITERAL)
        self._rank = {kind: rank for rank, kind in enumerate((*extra, *_RANKING, LITERAL))}
        self.placeholder = re.compile(rf"<(?:{'|'.join(self.kinds)})_[1-9][0-9]{{0,{MAX_NUMBER - 1}}}>")
        self.beginning = re.compile(rf"<[A-Z_]{{0,{max(map(len, self.kinds)) + 1}}}[0-9]{{0,{MAX_NUMBER}}}")
        self.longest = max(map(len, self.kinds)) + MAX_NUMBER + 3
        self.only_patterns = not extra
        self._analyze: Callable[[str], Iterable[tuple[int, int, str]]] | None = None
        if chosen.recognizer == "presidio":
            from llm_os.plugins.redact.presidio import Presidio

            self._analyze = Presidio(chosen.kinds).find

    def find(self, text: str) -> list[Span]:
        """In order, none overlapping another. Linear in the text, but for an operator's own patterns."""
        folded, places = self._folder.fold(text)
        spans = [Span(match.start(), match.end(), LITERAL) for match in self.placeholder.finditer(text)]
        for kind, pattern, check in self._recognizers:
            for match in pattern.finditer(folded):
                if (span := check(match)) is None or span[0] == span[1]:
                    continue
                if self._allowed and folded[span[0] : span[1]].casefold() in self._allowed:
                    continue
                spans.append(Span(places[span[0]], places[span[1] - 1] + 1, kind))
        if self._analyze is not None:
            spans += (Span(*found) for found in self._analyze(text) if not self._is_allowed(text, found))
        return self.merge(spans)

    def merge(self, spans: list[Span]) -> list[Span]:
        """Those that overlap become one, of the kind that is surest: what any of them covers is covered."""
        spans.sort()
        merged: list[Span] = []
        for span in spans:
            if merged and span.start < merged[-1].end:
                last = merged[-1]
                kind = min(last.kind, span.kind, key=self._rank.__getitem__)
                merged[-1] = Span(last.start, max(last.end, span.end), kind)
            else:
                merged.append(span)
        return merged

    def _is_allowed(self, text: str, found: tuple[int, int, str]) -> bool:
        return text[found[0] : found[1]].casefold() in self._allowed


_RANKING = (
    "URL", "IBAN", "CARD", "CRYPTO", "SSN", "NATIONAL_ID", "EMAIL", "IP", "BIRTHDATE", "SECRET", "PHONE", "NAME",
)  # fmt: skip
