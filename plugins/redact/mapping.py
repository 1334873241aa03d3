"""Which placeholder stands for which value, in one conversation.

    "mail a@b.org or c@d.org, not a@b.org"   ->   "mail <EMAIL_1> or <EMAIL_2>, not <EMAIL_1>"

A value keeps its placeholder from the text where it is found on, so that a conversation that grows begins as it did. A
value that was found once is found again where nothing but the value itself says what it is (a name, say). What looks
like a placeholder already gets one of its own (`<TEXT_1>`): after this, every placeholder in the text is of here.
"""

from __future__ import annotations

import re
from collections import defaultdict

from llm_os import RequestError
from llm_os.plugins.redact.finder import Finder, Span

MAX_VALUES = 10_000
_LONGEST_AGAIN = 64  # characters of a value that is looked for again; longer ones say themselves what they are
_WORD = re.compile(r"\w+")
_UNSPACED = re.compile(r"[\u0e00-\u0e4f\u3040-\u30ff\u3400-\u9fff]")  # scripts without spaces between words
_MAX_UNSPACED = 500


class Mapping:
    """Of one request: never shared."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder
        self._placeholders: dict[str, str] = {}  # value -> placeholder
        self._kinds: dict[str, str] = {}  # value -> kind
        self._counts: dict[str, int] = defaultdict(int)
        self._anchors: dict[str, set[tuple[int, int]]] = defaultdict(set)  # first word -> (where it is, value's length)
        self._unspaced: list[str] = []  # values that no space needs to surround
        self.values: dict[str, str] = {}  # placeholder -> value
        self.found: list[tuple[Span, str, str]] = []  # in the last text: where, the value, its placeholder

    def redact(self, text: str) -> str:
        """Raises RequestError when there are more than MAX_VALUES values."""
        found = self._finder.find(text)
        if found or self._kinds:
            for span in found:
                self._anchor(text[span.start : span.end], span.kind)
            found = self._finder.merge(found + self._again(text))
        pieces: list[str] = []
        end = 0
        self.found = []
        for span in found:
            value = text[span.start : span.end]
            placeholder = self._placeholder(value, span.kind)
            self.found.append((span, value, placeholder))
            pieces += text[end : span.start], placeholder
            end = span.end
        pieces.append(text[end:])
        return "".join(pieces)

    def _placeholder(self, value: str, kind: str) -> str:
        placeholder = self._placeholders.get(value)
        if placeholder is None:
            if len(self._placeholders) >= MAX_VALUES:
                raise RequestError(f"the request has more than {MAX_VALUES} pieces of personal data; send it in parts")
            kind = self._kinds.get(value, kind)
            self._counts[kind] += 1
            placeholder = self._placeholders[value] = f"<{kind}_{self._counts[kind]}>"
            self.values[placeholder] = value
        return placeholder

    def _anchor(self, value: str, kind: str) -> None:
        """Find it again, where it stands alone."""
        if value in self._kinds:
            return
        self._kinds[value] = kind
        if _UNSPACED.search(value) is not None:
            if len(value) > 1 and len(self._unspaced) < _MAX_UNSPACED:
                self._unspaced.append(value)
        elif 2 <= len(value) <= _LONGEST_AGAIN and (word := _WORD.search(value)) is not None:
            self._anchors[word[0]].add((word.start(), len(value)))

    def _again(self, text: str) -> list[Span]:
        found = [
            Span(match.start(), match.end(), self._kinds[value])
            for value in self._unspaced
            for match in re.finditer(re.escape(value), text)
        ]
        end = 0
        for word in _WORD.finditer(text):
            if word.start() < end or (places := self._anchors.get(word[0])) is None:
                continue
            for offset, length in sorted(places, key=lambda place: -place[1]):
                start = word.start() - offset
                value = text[start : start + length] if start >= 0 else ""
                if value in self._kinds and _alone(text, start, start + length):
                    end = start + length
                    found.append(Span(start, end, self._kinds[value]))
                    break
        return found


def _alone(text: str, start: int, end: int) -> bool:
    """It is no part of a longer word."""
    before = start > 0 and text[start].isalnum() and text[start - 1].isalnum()
    after = end < len(text) and text[end - 1].isalnum() and text[end].isalnum()
    return not (before or after)
