"""Text as the patterns see it: digits of any script as 0-9, any space as a space, any dash as "-", full-width and
mathematical letters as plain ones, and nothing that cannot be seen. Knows no kind of personal data.

    "tel．０１７０ 1２3"  ──fold──>  "tel.0170 123"       a position of the second is a position of the first
"""

from __future__ import annotations

import re
import sys
import unicodedata
from array import array
from collections.abc import Sequence

_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]"
)
_DOTS_AND_ATS = {
    "\u2024": ".",
    "\ufe52": ".",
    "\uff61": ".",
    "\ufe6b": "@",
    "\u2044": "/",
    "\u2215": "/",
    "\u2212": "-",
}


class Folder:
    """One table of characters, built once."""

    def __init__(self) -> None:
        table = {ord(strange): plain for strange, plain in _DOTS_AND_ATS.items()}
        for code in range(0x80, min(sys.maxunicode, 0x20000)):
            if (plain := _plain(chr(code))) is not None:
                table[code] = plain
        self._table = table

    def fold(self, text: str) -> tuple[str, Sequence[int]]:
        """The folded text, and where each of its characters stands in `text`, with one more entry for the end."""
        if text.isascii():
            return text, range(len(text) + 1)
        folded = text.translate(self._table)
        if _UNSEEN.search(folded) is None:
            return folded, range(len(text) + 1)
        places = array("q")
        start = 0
        for unseen in _UNSEEN.finditer(folded):
            places.extend(range(start, unseen.start()))
            start = unseen.end()
        places.extend(range(start, len(folded) + 1))
        return _UNSEEN.sub("", folded), places


def _plain(character: str) -> str | None:
    """What stands for it, if it is no plain character itself."""
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Zs":
        return " "
    if category == "Pd":
        return "-"
    if "\uff01" <= character <= "\uff5e" or "\U0001d400" <= character <= "\U0001d7cb":
        plain = unicodedata.normalize("NFKC", character)
        return plain if len(plain) == 1 and plain.isascii() else None
    return None
