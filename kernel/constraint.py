"""How one answer is held to its grammar: a mask for each token, begun when its batch is, awaited when it is sampled.

    Compile ──> Compiled, shared ──> Constraint, one per process ──mask(answer so far)──> AnswerMask, one per token

What is allowed is a function of the answer so far, so nothing has to be undone when a process is preempted, forked or
restored. Knows neither parsers nor threads: `Compiled.start` says where the plugin's code runs.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from llm_os.kernel.driver import Mask, Row, RowError, Sample, Sampled
from llm_os.kernel.errors import RequestError
from llm_os.kernel.grammar import Language, Matcher
from llm_os.kernel.image import Image

Work = Callable[[], bytes]


def _at_once(work: Work) -> Work:
    return work


class Compiled(Struct, frozen=True):
    """A language, shared by processes. `start(work)` begins work of the plugin that compiled it; what it returns waits
    for the result, or raises an Error. By default the work is done by who waits."""

    language: Language
    start: Callable[[Work], Work] = _at_once


class Constraint:
    """One process's."""

    def __init__(self, compiled: Compiled, image: Image, end_tokens: frozenset[int]) -> None:
        """`end_tokens` are those that end an answer of this process; other ends of the model are never allowed."""
        self.start = compiled.start
        self._language = compiled.language
        self._matcher: Matcher | None = None
        self._size = image.vocab_size
        self._foreign = (image.turn_end_tokens | image.text_end_tokens) - end_tokens

    def mask(self, answer: tuple[int, ...], before: Mask | None = None) -> AnswerMask:
        """What may come after `answer`. Where the last token of that is a guess, `before` is the mask that it must pass
        first: a matcher is never asked about an answer that the grammar does not allow."""
        return AnswerMask(self, answer, before if isinstance(before, AnswerMask) else None)

    def allowed(self, answer: tuple[int, ...]) -> bytes:
        """In the plugin's thread."""
        if self._matcher is None:
            self._matcher = self._language.matcher()
        bits = bytearray(self._matcher.allowed(answer))
        if len(bits) * 8 < self._size:
            raise ValueError(f"it gave bits for {len(bits) * 8} tokens of {self._size}")
        for token in self._foreign:
            bits[token >> 3] &= ~(1 << (token & 7))
        if not any(bits):
            raise RequestError(f"the grammar allows no token and no end after {len(answer)} tokens of the answer")
        return bytes(bits)


class AnswerMask:
    """What may come after one answer."""

    def __init__(self, constraint: Constraint, answer: tuple[int, ...], before: AnswerMask | None = None) -> None:
        self._constraint = constraint
        self._answer = answer
        self._before = before
        self._wait: Work | None = None
        self._bits = b""
        self._asked = False  # and answered

    def begin(self) -> None:
        if self._wait is None:
            self._wait = self._constraint.start(self._compute)

    def bits(self) -> bytes:
        self.begin()
        assert self._wait is not None
        bits = self._wait()
        self._asked = True
        return bits

    def _compute(self) -> bytes:
        """In the plugin's thread, after that of the mask before."""
        if self._before is not None and not self._before.has(self._answer[-1]):
            raise RequestError("the grammar does not allow a guess; no token may be chosen after it")
        self._bits = self._constraint.allowed(self._answer)
        return self._bits

    def has(self, token: int) -> bool:
        """Whether the token is among the bits, as far as they have been computed."""
        return 0 <= token < 8 * len(self._bits) and bool(self._bits[token >> 3] >> (token & 7) & 1)

    def allows(self, token: int) -> bool:
        """Whether the token is among `bits`. Never, where nobody has asked for them."""
        return self._asked and self.has(token)


def obeyed(sample: Sample | None, row: Row) -> Row:
    """The row, or an error where a driver chose against the mask, or without it."""
    mask = None if sample is None else sample.mask
    if isinstance(mask, AnswerMask) and isinstance(row, Sampled) and not mask.allows(row.token):
        return RowError("the driver chose a token that the grammar does not allow; it may not know Sample.mask")
    return row
