"""What an operator may set: `Config.options["redact"]`. Checked, and compiled, once at boot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from llm_os import ConfigError
from llm_os.plugins.redact.recognizers import KINDS

MAX_PATTERNS = 64
MAX_PATTERN = 1000  # characters
MAX_ALLOWED = 10_000
LITERAL = "TEXT"  # the kind of what only looks like a placeholder


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every field has a default."""

    kinds: tuple[str, ...] = KINDS  # what is looked for
    allow: tuple[str, ...] = ()  # values that are nobody's secret, such as the address of the support; case aside
    patterns: dict[str, str] = {}  # kinds of the operator's own: {"STAFF_ID": r"\bE\d{6}\b"}
    answers: bool = False  # also redact personal data that the model writes of its own accord
    recognizer: Literal["patterns", "presidio"] = "patterns"  # presidio: both
    max_characters: int | None = None  # of one request, more is refused; None is 500,000, or 50,000 with presidio

    @property
    def limit(self) -> int:
        if self.max_characters is not None:
            return self.max_characters
        return 50_000 if self.recognizer == "presidio" else 500_000


def read(options: Mapping[str, Any]) -> Options:
    """Raises ConfigError."""
    try:
        read = msgspec.convert(options, Options)
    except msgspec.ValidationError as error:
        raise ConfigError(f"options.redact: {error}; see docs/plugins/redact.md") from None
    if unknown := sorted(set(read.kinds) - set(KINDS)):
        raise ConfigError(f"options.redact.kinds has {unknown[0]!r}; there are: {', '.join(KINDS)}")
    if len(read.allow) > MAX_ALLOWED:
        raise ConfigError(f"options.redact.allow has {len(read.allow)} values; the limit is {MAX_ALLOWED}")
    if not 1 <= read.limit <= 2**31:
        raise ConfigError(f"options.redact.max_characters is {read.max_characters}; it must be from 1 to {2**31}")
    return read


def compile_patterns(patterns: Mapping[str, str]) -> dict[str, re.Pattern[str]]:
    """Raises ConfigError, which names the pattern."""
    if len(patterns) > MAX_PATTERNS:
        raise ConfigError(f"options.redact.patterns has {len(patterns)} patterns; the limit is {MAX_PATTERNS}")
    compiled = {}
    for kind, source in patterns.items():
        where = f"options.redact.patterns[{kind[:40]!r}]"
        if not re.fullmatch(r"[A-Z][A-Z_]{1,18}[A-Z]", kind) or kind in (*KINDS, LITERAL):
            raise ConfigError(f"{where}: a kind is 3 to 20 of A-Z and _, and none of: {', '.join((*KINDS, LITERAL))}")
        if len(source) > MAX_PATTERN:
            raise ConfigError(f"{where} has {len(source)} characters; the limit is {MAX_PATTERN}")
        try:
            compiled[kind] = re.compile(source)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{where} is no regular expression: {error}") from None
    return compiled
