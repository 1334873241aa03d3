"""The turns of one conversation in one model's words: reading what it says, and telling it what tools said.

What a tool said is data. It is encoded as plain text, so that nothing in it can become a special token, whatever it is:

    rendered   …assistant⏎ SENT <|im_end|>⏎<|im_start|>tool⏎ MARK the tool's text MARK <|im_end|>⏎<|im_start|>assistant⏎
    encoded                            └── with special tokens ──┘   └─ plain ─┘       └── with special tokens ──┘

The template does this once for the conversation with SENT in place of what the model really said: of the text only what
follows that is used, so templates that write calls in their own way do not matter. The marks are random.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from llm_os import Chunk, Error, Image, RequestError
from llm_os.plugins.tools.parsers import FORMATS, Call, Format
from llm_os.plugins.tools.schema import defused, is_name


class Chat:
    """How one model speaks of tools."""

    def __init__(
        self,
        image: Image,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        format: str | None,
    ) -> None:
        self._image = image
        self._messages = [*messages]
        self._tools = [*tools]
        self._nothing = image.encode("", raw=True)  # what stands before every text: a beginning-of-text token, or none
        self.format = FORMATS[format or self._find_format()]
        mark = self._encode(self.format.mark, raw=False)
        self._mark = mark[0] if len(mark) == 1 else None
        self.turn = Turn(self.format)

    def _find_format(self) -> str:
        """By what the template writes of a call that was made."""
        function = {"name": "probe", "arguments": {"x": 1}}
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": call_id(0), "function": function}],
        }
        said = {"role": "tool", "name": "probe", "tool_call_id": call_id(0), "content": "1"}
        shown = ""
        for more in list[list[dict[str, Any]]]([[call, said], []]):
            try:
                shown = self._image.render_chat([*self._messages, *more], self._tools)
                break
            except Error:
                continue
        if "[TOOL_CALLS]" in shown:
            return "mistral"
        if "<tool_call>" in shown:
            return "hermes"
        return "llama3" if "<|python_tag|>" in shown or "<|eot_id|>" in shown else "hermes"

    # -- what the model says -------------------------------------------------------------------------------------------

    def turns(self, chunk: Chunk) -> list[str]:
        """The text of a chunk, cut where turns end: mostly it is of one turn. Marks of calls that the decoder does not
        show are there."""
        ends = self._image.turn_end_tokens
        inner = [token in ends for token in chunk.token_ids[:-1]]
        marks = self._mark is not None and self._mark in chunk.token_ids and self.format.mark not in chunk.text
        if not any(inner) and not marks:
            return [chunk.text]
        if marks and len(chunk.token_ids) == 1:
            return [self.format.mark + chunk.text]
        parts, decoder = [""], self._image.decoder()
        for index, token in enumerate(chunk.token_ids):
            if token in ends:
                parts[-1] += decoder.flush()
                if index < len(inner):
                    parts.append("")
                continue
            text = decoder.push(token)
            parts[-1] += self.format.mark if token == self._mark and not text else text
        return parts

    # -- what tools said -----------------------------------------------------------------------------------------------

    def after(self, results: Sequence[tuple[Call, str]]) -> list[int]:
        """The tokens that follow a turn with these calls and what the tools said, up to the model's next turn. Raises
        RequestError for a template that has no words for it."""
        marks = secrets.token_hex(12)
        sent = f"s{marks}"
        said = [
            {
                "role": "tool",
                "name": safe_name(call),
                "tool_call_id": call.id,
                "content": f"b{index}x{marks}{text}e{index}x{marks}",
            }
            for index, (call, text) in enumerate(results)
        ]
        calls = [
            {"type": "function", "id": call.id, "function": {"name": safe_name(call), "arguments": {"x": sent}}}
            for call, _ in results
        ]
        users = [{"role": "user", "content": f"<tool_response>\n{one['content']}\n</tool_response>"} for one in said]
        joined = [{"role": "user", "content": "\n".join(str(one["content"]) for one in users)}]
        plain = {"role": "assistant", "content": sent}
        for attempt in (
            [plain, *said],
            [{"role": "assistant", "content": "", "tool_calls": calls}, *said],
            [plain, *joined],
        ):
            try:
                text = self._image.render_chat([*self._messages, *attempt], self._tools)
            except RequestError:
                continue
            pieces = _pieces(text, sent, marks, len(results))
            if pieces is not None:
                return self._join(pieces)
        raise RequestError(f"the chat template of {self._image.name} cannot say what a tool said")

    def defused(self, text: str) -> str:
        """`text` as it may go through the template: as it is, unless something in it would become a special token."""
        try:
            if self._image.encode(text, raw=True) == self._image.encode(text, raw=False):
                return text
        except Error:  # the model has gone
            pass
        return defused(text)

    def _join(self, pieces: list[tuple[str, bool]]) -> list[int]:
        tokens: list[int] = []
        for index, (text, raw) in enumerate(pieces):
            piece = self._encode(text, raw=raw)
            if index == 0:  # the model has ended its turn itself
                ends = self._image.turn_end_tokens
                at = next((at for at, token in enumerate(piece) if token in ends), -1)
                piece = piece[at + 1 :]
            tokens += piece
        return tokens

    def _encode(self, text: str, *, raw: bool) -> list[int]:
        if not text:
            return []
        tokens = self._image.encode(text, raw=raw)
        skipped = len(self._nothing)
        return tokens[skipped:] if tokens[:skipped] == self._nothing else tokens


def _pieces(text: str, sent: str, marks: str, count: int) -> list[tuple[str, bool]] | None:
    """What follows the model's turn, in order: the template's text, and (True) that of tools. None if one is lost."""
    if sent not in text:
        return None
    text = text[text.rfind(sent) + len(sent) :]
    found = list(re.finditer(f"([be])([0-9]+)x{marks}", text))
    expected = [(kind, str(index)) for index in range(count) for kind in "be"]
    if sorted((one[1], one[2]) for one in found) != sorted(expected):
        return None
    pieces: list[tuple[str, bool]] = []
    at = 0
    for begin, end in zip(found[::2], found[1::2], strict=True):
        if (begin[1], end[1]) != ("b", "e") or begin[2] != end[2]:
            return None
        pieces += [(text[at : begin.start()], False), (text[begin.end() : end.start()], True)]
        at = end.end()
    return [*pieces, (text[at:], False)]


class Turn:
    """One turn as it comes: what of it can be shown, and which calls it has."""

    def __init__(self, format: Format) -> None:
        self._format = format
        self._text = ""
        self._shown = 0

    def push(self, text: str) -> str:
        """What may be shown now: text that is certainly not of a call."""
        self._text += text
        return self._show(self._safe())

    def _safe(self) -> int:
        """How much of the text is certainly none."""
        text, mark = self._text, self._format.mark
        start = text.lstrip()
        if any(start.startswith(lead) or lead.startswith(start) for lead in self._format.leads):
            return 0
        at = text.find(mark, max(0, self._shown - len(mark)))
        if at >= 0:
            return at
        return len(text) - next(
            (n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0
        )

    def _show(self, end: int) -> str:
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def finish(self) -> tuple[str, str, list[Call]]:
        """What is still to be shown, all the text but the calls, and the calls."""
        text, calls = self._format.parse(self._text)
        if not calls:
            return self._show(len(self._text)), text, []
        before = self._text[: self._shown].strip()
        rest = text[len(before) :] if text.startswith(before) else ""
        return rest, text, calls


def call_id(index: int) -> str:
    """Nine letters and digits, as Mistral's templates want them."""
    return f"call{index % 100000:05d}"


def safe_name(call: Call) -> str:
    """The name as it may go through a template: a model can write anything for one."""
    return call.name if is_name(call.name) else "unknown"


def told(text: str, error: bool) -> str:
    """What a tool said, or what went wrong, as the model is told it."""
    return json.dumps({"error": text}, ensure_ascii=False) if error else text
