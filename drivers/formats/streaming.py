"""Tokens to text, one at a time, never half a character. Knows pieces of bytes, not where they come from."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class Utf8Decoder:
    """The `TextDecoder` of every tokenizer. One process's state; not for two threads at once.

    Bytes that can no longer become a character turn into U+FFFD as soon as that is known (Unicode's "maximal subpart"
    practice), so that all pushes and the flush, joined, are the whole byte string decoded at once.
    """

    def __init__(self, piece: Callable[[int], bytes], start: int | None = None) -> None:
        """After the token `start`, if it comes first, one leading space is the encoder's own and not shown."""
        self._piece = piece
        self._start = start
        self._first = True
        self._strip = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that became complete with this token: possibly "", never half a character."""
        if self._first:
            self._first = False
            self._strip = token_id == self._start
        piece = self._piece(token_id)
        if piece and self._strip:
            self._strip = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is still held back, with undecodable bytes replaced by U+FFFD. The decoder can go on afterwards."""
        return self._utf8.decode(b"", final=True)
