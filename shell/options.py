"""Options that several commands share, and what they make: a Sampling and a Config. Checks nothing by itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from cyclopts import Group, Parameter

import llm_os
from llm_os.shell import settings

ANSWER = Group("Answer", sort_key=1)
MACHINE = Group("Machine", sort_key=2)
FLAG = Parameter(negative="", show_default=False)


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

    def sampling(self) -> llm_os.Sampling:
        """Raises RequestError for a value out of range."""
        return llm_os.Sampling(**asdict(self))


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

    def config(self) -> llm_os.Config:
        """With what the settings file says. Raises ConfigError for a value out of range."""
        return settings.config(**asdict(self))
