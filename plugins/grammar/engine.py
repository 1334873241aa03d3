"""llguidance behind the contract of `compile_grammar`: vocabularies, languages, matchers, errors. Starts no process.

What may come next depends on the answer so far and on nothing else. Copies of a compiled grammar share a lexer that
remembers; where that has grown to its limit, a matcher goes on with a new one, so no answer ends because of others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import llguidance

from llm_os import Image, RequestError

LIMITS: dict[str, Any] = {  # of llguidance; one step of it takes some 20 ms at the most
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 25_000,  # of 1 to 2 KiB
    "max_grammar_size": 500_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
OPTIONS: dict[str, Any] = {  # of JSON: models that are lost write spaces for ever
    "whitespace_pattern": r"[ \t\n\r]{1,20}",
}
NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "Lark grammar"}


class Vocabulary:
    """One model's tokens, as llguidance wants them. Takes 0.2 s to make for 49,152 tokens."""

    eos_token_id: int
    bos_token_id = None
    special_token_ids = ()
    is_tokenizer_wrapper = True

    def __init__(self, tokens: Sequence[bytes], ends: Sequence[int]) -> None:
        """Raises RequestError for a model of which no end token is known."""
        if not ends:
            raise RequestError("the model has no token that ends an answer, so no answer can be held to a grammar")
        self.tokens = tokens
        self.ends = tuple(ends)
        self.eos_token_id = ends[0]
        self._ids = {text: token for token, text in reversed([*enumerate(tokens)]) if text}
        self._longest = max(map(len, self._ids), default=0)
        self.tokenizer = llguidance.LLTokenizer(self, eos_token=list(ends))  # type: ignore[arg-type]

    def __call__(self, text: str) -> list[int]:
        """For bytes that a grammar leaves no choice about: the longest token first."""
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            for end in range(min(len(data), at + self._longest), at, -1):
                if (token := self._ids.get(data[at:end])) is not None:
                    ids.append(token)
                    at = end
                    break
            else:
                return ids
        return ids

    @classmethod
    def of(cls, image: Image) -> Vocabulary:
        return cls(image.token_bytes(), sorted(image.turn_end_tokens | image.text_end_tokens))


class Language:
    """A grammar for a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, grammar: str) -> None:
        """Raises RequestError where it breaks a limit."""
        self.vocabulary = vocabulary
        self._grammar = grammar
        self._base = self.compiled()

    def compiled(self) -> llguidance.LLMatcher:
        """One that shares nothing."""
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(self.vocabulary.tokenizer, self._grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(_line(matcher.get_error()))
        return matcher

    def copy(self) -> llguidance.LLMatcher:
        return self._base.deep_copy()

    def renew(self) -> llguidance.LLMatcher:
        """A compiled one, for whoever asks next too."""
        self._base = self.compiled()
        return self._base.deep_copy()

    def matcher(self) -> Matcher:
        return Matcher(self)


class Matcher:
    """Follows one answer."""

    def __init__(self, language: Language) -> None:
        self._language = language
        self._matcher = language.copy()
        self._answer: tuple[int, ...] = ()

    def allowed(self, answer: Sequence[int]) -> bytes:
        answer = tuple(answer)
        bits = self._bits(answer)
        if bits is None:  # a limit, maybe of what others have left in the lexer
            self._matcher, self._answer = self._language.renew(), ()
            bits = self._bits(answer)
        if bits is None:
            reason = _line(self._matcher.get_error()) or "the answer does not match it"
            raise RequestError(f"the grammar cannot go on after {len(answer)} tokens of the answer: {reason}")
        return bits

    def _bits(self, answer: tuple[int, ...]) -> bytes | None:
        matcher, known = self._matcher, self._answer
        common = len(known)
        if answer[:common] != known:
            same = [mine == theirs for mine, theirs in zip(known, answer, strict=False)]
            common = same.index(False) if False in same else len(same)
            if not matcher.rollback(len(known) - common):
                return None
        new = list(answer[common:])
        self._answer = answer
        if new and matcher.try_consume_tokens(new) != len(new):
            return None
        bits = bytes(matcher.compute_bitmask())
        return None if matcher.is_error() else bits


def check_syntax(kind: str, source: str) -> None:
    """Raises RequestError for a schema that is no JSON, with the place."""
    if kind != "json_schema":
        return
    try:
        schema = json.loads(source)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RequestError(f"the JSON schema is not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise RequestError("the JSON schema is nested too deeply; make it simpler") from None
    if not isinstance(schema, dict):
        raise RequestError("the JSON schema is no JSON object; {} stands for any JSON")


def to_grammar(kind: str, source: str) -> str:
    """What llguidance compiles. Raises RequestError."""
    try:
        if kind == "json_schema":
            return llguidance.LLMatcher.grammar_from_json_schema(source, defaults=OPTIONS)  # type: ignore[arg-type]
        if kind == "regex":
            return llguidance.LLMatcher.grammar_from_regex(source)
        return llguidance.LLMatcher.grammar_from_lark(source)
    except ValueError as error:
        raise RequestError(f"the {NAMES[kind]} cannot be used: {_line(str(error))}") from None


def explain(kind: str, wrong: str, where: str) -> RequestError:
    """What llguidance says of a grammar, in one line, with the place."""
    reason = wrong
    if parsed := re.search(r"regex parse error:\n    (.*)\n    ( *)\^+.*\nerror: (.*)", wrong):
        reason = f"{parsed[3]}, at character {len(parsed[2]) + 1} of {parsed[1][:80]!r}"
        if kind == "lark" and (line := re.match(r"at (\d+)\((\d+)\)", wrong)):
            reason = f"line {line[1]}, column {line[2]}: {reason}"
    elif line := re.match(r"(?:at )?(\d+)\((\d+)\): (.*)", wrong):
        reason = f"line {line[1]}, column {line[2]}: {line[3]}"
    if where:
        reason = f"{reason} (at {where[:200]})"
    return RequestError(f"the {NAMES[kind]} cannot be used: {_line(reason)}")


def _line(text: str) -> str:
    return " ".join(text.replace("<non-verbose/>", " ").split())[:300]
