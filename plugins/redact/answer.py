"""The way back: what a model's answer goes through. However it is cut into pieces, the same comes out.

Restorer    <EMAIL_1> -> the value that it stands for. Holds back what may be the beginning of a placeholder.
Screen      personal data that the model writes of its own accord -> <EMAIL>. Holds back what belongs together, at
            most HELD characters: words that may be of one name, date or number, and the word that is being written.
"""

from __future__ import annotations

import re

from llm_os.plugins.redact.contexts import MONTHS
from llm_os.plugins.redact.finder import Finder
from llm_os.plugins.redact.options import LITERAL

HELD = 256  # characters
_CONTEXT = 96  # characters before, in which the words stand that say what comes
_BREAK = r"\s\u0e00-\u0e4f\u3001-\u30ff\u3400-\u9fff\uac00-\ud7af，．：；！？"  # spaces, and scripts that have none
_TOKEN = re.compile(rf"[^{_BREAK}]+")
_CLEAR = re.compile(r"[a-zß-öø-ÿ\s.,;:!?'’\"()-]*")  # in it, nothing is found
_SMALL = "de del della di da do dos das of van von zu der den la le du bin al el y"
_LINKS = MONTHS.union(_SMALL.split())


class Restorer:
    """Puts values in the place of their placeholders. One that stands for nothing stays as it is."""

    def __init__(self, finder: Finder, values: dict[str, str]) -> None:
        self._finder = finder
        self._values = values
        self._held = ""

    def push(self, text: str) -> str:
        text = self._held + text
        begin = text.rfind("<", -self._finder.longest + 1)
        if begin < 0 or self._finder.beginning.fullmatch(text, begin) is None:
            begin = len(text)
        self._held = text[begin:]
        return self._finder.placeholder.sub(self._value, text[:begin])

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _value(self, match: re.Match[str]) -> str:
        return self._values.get(match[0], match[0])


class Screen:
    """Cuts an answer where nothing that it looks for can go on, and looks at one piece after the other."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder
        self._before = ""
        self._held = ""

    def push(self, text: str) -> str:
        self._held += text
        return self._pieces(over=False)

    def flush(self) -> str:
        return self._pieces(over=True)

    def _pieces(self, over: bool) -> str:
        shown = []
        start = 0
        while (end := self._cut(start, over)) is not None:
            piece = self._held[start:end]
            shown.append(self._screened(piece))
            self._before = (self._before + piece)[-_CONTEXT:]
            start = end
        self._held = self._held[start:]
        return "".join(shown)

    def _cut(self, start: int, over: bool) -> int | None:
        """Where the piece from `start` on ends: it depends on what comes there, not on how much is here already."""
        limit = min(start + HELD, len(self._held))
        linked, end = None, start
        for token in _TOKEN.finditer(self._held, start, limit):
            whole = token.end() < limit or (over and token.end() == len(self._held) < start + HELD)
            if not whole:
                break
            links = _links(token[0])
            if linked is not None and not (linked and links and "\n" not in self._held[end : token.start()]):
                return end
            linked, end = links, token.end()
        if limit == start + HELD:
            return limit
        return limit if over and limit > start else None

    def _screened(self, piece: str) -> str:
        if self._finder.only_patterns and _CLEAR.fullmatch(piece) is not None:
            return piece
        offset = len(self._before)
        text = self._before + piece
        shown: list[str] = []
        end = offset
        for span in self._finder.find(text):
            if span.end <= offset or span.kind == LITERAL:
                continue
            shown += text[end : max(span.start, offset)], f"<{span.kind}>"
            end = span.end
        return "".join((*shown, text[end:]))


def _links(token: str) -> bool:
    """It may be of one name, date or number with the next one."""
    return any(c.isupper() or c.isdigit() for c in token) or token.strip(".,").lower() in _LINKS


class Answer:
    """Both, in order."""

    def __init__(self, restorer: Restorer, screen: Screen | None) -> None:
        self._restorer = restorer
        self._screen = screen

    def push(self, text: str) -> str:
        return self._restorer.push(self._screen.push(text) if self._screen is not None else text)

    def flush(self) -> str:
        last = self._screen.flush() if self._screen is not None else ""
        return self._restorer.push(last) + self._restorer.flush()
