"""A model's token list: what each token is, what it says, and which tokens end an answer.

Knows nothing of how text is cut into tokens, and nothing of files beyond the name that errors carry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set
from enum import IntEnum

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Library


class Kind(IntEnum):
    """`tokenizer.ggml.token_type`, as GGUF numbers it."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # recognised in chat text only, never shown
    USER_DEFINED = 4  # recognised everywhere, shown as it is written
    UNUSED = 5
    BYTE = 6


# What llama.cpp takes for an end of generation, by its text (`special_eog_ids`), without the fill-in-the-middle tokens:
# those end no turn.
_TURN_END_NAMES = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<end_of_utterance>",
        "<turn|>",
        "<|tool_response>",
        "[e~[",
    ]
)
_TEXT_END_NAMES = frozenset(["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>"])
_HTML_LIKE = frozenset({"</s>", "<eos>"})  # ends only where the model says control: gemma has </s> as an HTML tag
_SHOWN = frozenset(["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"])  # gpt-oss: part of the answer

_FILL_NAMES = frozenset(
    [
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        "<|fim_pad|>",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<|file_sep|>",
        "<fim-prefix>",
        "<fim-suffix>",
        "<fim-middle>",
        "<fim-pad>",
        "<fim-repo>",
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        "<fim_pad>",
        "<｜fim▁begin｜>",
        "<｜fim▁hole｜>",
        "<｜fim▁end｜>",
        "▁<PRE>",
        "▁<SUF>",
        "▁<MID>",
        "<reponame>",
    ]
)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _bytes_of_characters() -> dict[str, int]:
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTES_OF_CHARACTERS = _bytes_of_characters()  # GPT-2's printable stand-ins for bytes (Radford et al. 2019)


class Vocabulary:
    """Tokens by id, with the ids that have a role. `byte_level` says how a token's text spells bytes."""

    def __init__(
        self,
        tokens: Sequence[str],
        kinds: Sequence[int],
        *,
        byte_level: bool,
        bos: int | None,
        eos: int | None,
        ends: Iterable[int] = (),
    ) -> None:
        self.tokens = tokens
        self.kinds = list(kinds)
        self.bos = bos
        self.eos = eos
        self._byte_level = byte_level
        self._ends = {end for end in (eos, *ends) if end is not None}
        self._text_ends: set[int] = set()
        self._find_roles()

    def __len__(self) -> int:
        return len(self.tokens)

    def _find_roles(self) -> None:
        found = {}
        for token, text in enumerate(self.tokens):
            if text in _FILL_NAMES:
                self.kinds[token] = Kind.CONTROL
            if text in _TURN_END_NAMES or text in _TEXT_END_NAMES or text in _SHOWN:
                found[text] = token
        for text, token in found.items():
            if text in _SHOWN:
                self.kinds[token] = Kind.USER_DEFINED
            elif self.kinds[token] == Kind.CONTROL or text not in _HTML_LIKE:
                self.kinds[token] = Kind.CONTROL  # files are known that call them ordinary text
                self._ends.add(token)
                if text in _TEXT_END_NAMES:
                    self._text_ends.add(token)
        if "<|end|>" in found and (
            {"<|return|>", "<|call|>"} <= found.keys() or {"<|flush|>", "<|calls|>"} <= found.keys()
        ):  # there it ends a message, not the answer
            self._ends.discard(found["<|end|>"])
            self.kinds[found["<|end|>"]] = Kind.USER_DEFINED

    def text(self, token: int | None) -> str:
        """How the token is written, "" for None."""
        return "" if token is None else self.tokens[token]

    def of_kind(self, *kinds: Kind) -> list[tuple[int, str]]:
        """Tokens with their texts."""
        return [(token, self.tokens[token]) for token, kind in enumerate(self.kinds) if kind in kinds]

    def turn_ends(self) -> frozenset[int]:
        return frozenset(self._ends)

    def text_ends(self, template: str | None) -> frozenset[int]:
        """Ends of text: the well-known ones, and the eos unless the chat template writes it: then it marks turns."""
        ends = set(self._text_ends)
        if self.eos is not None and not (
            template is not None and ("eos_token" in template or self.tokens[self.eos] in template)
        ):
            ends.add(self.eos)
        return frozenset(ends or self._ends)

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; b"" for control tokens and ids beyond the vocabulary."""
        if not 0 <= token < len(self.tokens):
            return b""
        text, kind = self.tokens[token], self.kinds[token]
        if kind == Kind.USER_DEFINED:
            return text.encode()
        if kind == Kind.BYTE and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes((int(byte[1], 16),))
        if kind != Kind.NORMAL:
            return b""
        if not self._byte_level:
            return text.replace("▁", " ").encode()
        try:
            return bytes([BYTES_OF_CHARACTERS[character] for character in text])
        except KeyError:
            return text.encode()


class SpecialTokens:
    """Finds tokens that are recognised by their text. The longest at the leftmost place wins, in linear time."""

    def __init__(self, tokens: Sequence[tuple[int, str]], strip_after: Set[str] = frozenset()) -> None:
        """`strip_after` are texts that take the (ASCII) white space after them along."""
        self._tokens = [(token, text in strip_after) for token, text in tokens]
        self._matcher = Library(models.BPE())  # no vocabulary: what is between the tokens vanishes
        self._matcher.add_special_tokens([AddedToken(text, normalized=False, special=True) for _, text in tokens])

    def split(self, text: str) -> list[int | str]:
        """Token ids and the non-empty pieces of text between them, in order."""
        if not self._tokens:
            return [text] if text else []
        found = self._matcher.encode(text, add_special_tokens=False)
        parts: list[int | str] = []
        at = 0
        for index, (start, end) in zip(found.ids, found.offsets, strict=True):
            if start < at:  # white space that the token before it has taken
                continue
            if start > at:
                parts.append(text[at:start])
            token, strip = self._tokens[index]
            parts.append(token)
            at = end
            while strip and at < len(text) and text[at] in " \t\n\v\f\r":
                at += 1
        if at < len(text):
            parts.append(text[at:])
        return parts
