"""Options that several commands share, and what they make: a Sampling and a Config. Checks nothing by itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

import llm_os
from llm_os.shell import settings

ANSWER = Group("Answer", sort_key=1)
MACHINE = Group("Machine", sort_key=2)
_LARGEST_GRAMMAR = 4 << 20  # bytes
FLAG = Parameter(negative="", show_default=False)
TOOL = Annotated[tuple[str, ...], Parameter(group=ANSWER, negative="", show_default=False)]


@Parameter(name="*", group=ANSWER)
@dataclass(frozen=True)
class SamplingOptions:
    """How the answer is sampled. What is not given is the model's own recommendation."""

    max_tokens: Annotated[int | None, Parameter(alias="-n")] = None
    """The most tokens of the answer."""
    temperature: Annotated[float | None, Parameter(alias="-t")] = None
    """0 always takes the likeliest token."""
    top_k: int | None = None
    """Choose among this many tokens; 0 is off."""
    top_p: float | None = None
    """Choose among the likeliest tokens that make up this share, 0 to 1."""
    min_p: float | None = None
    """Leave out tokens below this share of the likeliest one's probability."""
    repetition_penalty: float | None = None
    """Above 1: rarely say again what was said."""
    seed: int | None = None
    """The same seed gives the same answer."""
    stop: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = ()
    """Text that ends the answer; may be given several times."""

    def sampling(self, grammar: llm_os.Grammar | None = None) -> llm_os.Sampling:
        """Raises RequestError for a value out of range."""
        return llm_os.Sampling(**asdict(self), grammar=grammar)


@Parameter(name="*", group=ANSWER)
@dataclass(frozen=True)
class GrammarOptions:
    """What the answer must match: one of them, or nothing."""

    json_schema: str | None = None
    """A JSON schema that the answer matches: a file, or the schema itself."""
    regex: str | None = None
    """A regular expression that the whole answer matches."""
    grammar: Path | None = None
    """A file with a Lark grammar that the answer matches."""

    def chosen(self) -> llm_os.Grammar | None:
        """Raises RequestError for more than one, and for a file that cannot be read."""
        given = {f"--{name.replace('_', '-')}": value for name, value in asdict(self).items() if value is not None}
        if len(given) > 1:
            raise llm_os.RequestError(f"an answer matches one grammar; give one of {' and '.join(given)}")
        if self.json_schema is not None:
            text = self.json_schema if self.json_schema.lstrip().startswith("{") else _read(Path(self.json_schema))
            return llm_os.Grammar(kind="json_schema", source=text)
        if self.regex is not None:
            return llm_os.Grammar(kind="regex", source=self.regex)
        return None if self.grammar is None else llm_os.Grammar(kind="lark", source=_read(self.grammar))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_GRAMMAR + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise llm_os.RequestError(f"{str(path)[:200]}: the grammar cannot be read: {reason}") from None
    if len(data) > _LARGEST_GRAMMAR:
        raise llm_os.RequestError(f"{path}: a grammar of more than {_LARGEST_GRAMMAR} bytes; make it smaller")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise llm_os.RequestError(f"{path}: the grammar is not UTF-8 text (at byte {error.start})") from None


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class MachineOptions:
    """How the kernel is built."""

    precision: Literal["fast", "exact"] = "fast"
    """exact: float32, the same bits on every run."""
    memory: str | None = None
    """What the kernel may use, such as 2GiB; not given, 80% of what is free."""
    driver: str = "auto"
    """cpu, cuda, or auto: cuda where there is a GPU."""
    threads: int | None = None
    """Threads of the cpu driver."""
    speculation: Literal["auto", "always", "off"] | None = None
    """Check guesses of what comes next: auto, where that is quicker; always; off. It changes no answer."""

    def config(self, **otherwise: Any) -> llm_os.Config:
        """With what the settings file says, and `otherwise` for options that are not given. Raises ConfigError for a
        value out of range."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return settings.config(**{**otherwise, **given})
