"""What an answer must look like: the contract of constrained decoding. No parser, no vocabulary.

Grammar ──compile_grammar──> Language ──matcher──> Matcher, one per process ──allowed(answer so far)──> bit mask
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from llm_os.kernel.errors import RequestError
from llm_os.kernel.strict import Strict

MAX_SOURCE = 2**20  # characters of a schema, regex or grammar


class Grammar(Strict, frozen=True, kw_only=True):
    """What every answer must match, from its first token to its end. Raises RequestError if it is empty or too long."""

    error = RequestError

    kind: Literal["json_schema", "regex", "lark"]
    source: str  # a JSON schema as text, a regular expression, or a Lark grammar

    def __post_init__(self) -> None:
        if not 0 < len(self.source) <= MAX_SOURCE:
            raise RequestError(f"a grammar has {len(self.source)} characters; it must have 1 to {MAX_SOURCE}")


class Matcher(Protocol):
    """Follows one answer. Used by one process; its calls come one at a time, from any thread."""

    def allowed(self, answer: Sequence[int]) -> bytes:
        """Which tokens may come after `answer` (token ids): bit i % 8 of byte i // 8 is token i; the end tokens are
        among them where the answer may end. Of the same length for all answers, at least ceil(vocab_size / 8).

        Answers usually grow by one token from call to call, but may be any. Raises RequestError for an answer that the
        grammar does not allow.
        """
        ...


class Language(Protocol):
    """A compiled grammar. Immutable, shared by processes."""

    def matcher(self) -> Matcher:
        """A fresh one, at the beginning of an answer."""
        ...
