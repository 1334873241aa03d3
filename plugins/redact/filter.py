"""The filter of a kernel: requests without personal data to the model, answers with it to the reader. Keeps nothing
between two requests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping as Fields
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import structs

from llm_os import Request, RequestError, TextFilter
from llm_os.plugins.redact.answer import Answer, Restorer, Screen
from llm_os.plugins.redact.finder import Finder
from llm_os.plugins.redact.mapping import Mapping
from llm_os.plugins.redact.options import Options

_MAX_NESTING = 32
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_AS_THEY_ARE = ("role", "type")  # fields of a message and of its parts that say what they are


class Redaction:
    """Opens a mapping for each request. Raises ConfigError for options that cannot be used."""

    def __init__(self, chosen: Options) -> None:
        self._finder = Finder(chosen)
        self._chosen = chosen

    def open(self, request: Request) -> tuple[Request, TextFilter | None] | None:
        """Raises RequestError for token ids, and for more text or values than the limits allow."""
        if request.prompt is not None and not isinstance(request.prompt, str):
            raise RequestError(
                "the prompt is token ids, which the plugin 'redact' cannot read; send it as text, or as messages"
            )
        conversation = _Conversation(self._finder, self._chosen.limit)
        changes: dict[str, Any] = {}
        if tools := getattr(request, "tools", ()):
            changes["tools"] = tuple(conversation.redact(tools))
        if request.messages is not None:
            changes["messages"] = conversation.redact(request.messages)
        else:
            changes["prompt"] = conversation.redact(request.prompt)
        values = conversation.mapping.values
        if not values and not self._chosen.answers:
            return None
        screen = Screen(self._finder) if self._chosen.answers else None
        changed = structs.replace(request, **changes) if values else request
        return changed, Answer(Restorer(self._finder, values), screen)


class _Conversation:
    """Every text of a request, in order, through one mapping."""

    def __init__(self, finder: Finder, limit: int) -> None:
        self.mapping = Mapping(finder)
        self._left = self._limit = limit

    def redact(self, value: Any, depth: int = _MAX_NESTING, parsed: bool = False) -> Any:
        """What JSON can say, with every text in it redacted: keys too, and numbers long enough to be somebody's."""
        if isinstance(value, str):
            return self._text(str(value), parsed)
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            return self._number(value)
        if depth == 0:
            raise RequestError(f"messages are nested more than {_MAX_NESTING} deep, which is the limit")
        if isinstance(value, Fields):
            return {
                self._text(str(key), True): self._field(key, item, depth - 1, parsed) for key, item in value.items()
            }
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
            return [self.redact(item, depth - 1, parsed) for item in value]
        raise RequestError(f"messages hold a {type(value).__name__}; they may hold only what JSON can say")

    def _field(self, key: Any, item: Any, depth: int, parsed: bool) -> Any:
        of_a_message = depth >= _MAX_NESTING - 4 and not parsed  # or of a part of one, not of a call's arguments
        if of_a_message and key in _AS_THEY_ARE and isinstance(item, str) and item.isidentifier():
            return item
        return self.redact(item, depth, parsed)

    def _text(self, text: str, parsed: bool) -> str:
        self._left -= len(text)
        if self._left < 0:
            raise RequestError(
                f"the request has more than {self._limit} characters; send less, or raise options.redact.max_characters"
            )
        if not parsed and "\\" in text and text.lstrip()[:1] in ("{", "["):  # JSON, whose escapes may hide what it says
            try:
                plain = msgspec.json.decode(text)
            except (msgspec.DecodeError, UnicodeError, RecursionError):
                return self.mapping.redact(text)
            redacted = self.redact(plain, parsed=True)
            if redacted != plain:
                return msgspec.json.encode(redacted).decode()
            spelt = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)  # of a key that is there twice, say
            if (redacted := self.mapping.redact(spelt)) != spelt:
                return redacted
        return self.mapping.redact(text)

    def _number(self, number: int) -> int | str:
        if abs(number) < 10**6 or abs(number) >= 10**40:
            return number
        digits = str(number)
        redacted = self.mapping.redact(digits)
        return number if redacted == digits else redacted
