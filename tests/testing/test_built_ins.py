"""Plugins that come with llm-os pass the suites that strangers get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

import llm_os
from llm_os.testing import FilterConformance, PassConformance, ToolConformance

LETTER = (
    "Write to Ada Lovelace, ada@example.org, +49 30 1234567, about invoice 4111 1111 1111 1111 and IBAN "
    "DE89 3704 0044 0532 0130 00."
)
NAMED = ("[EMAIL_1]", "<EMAIL_1>", "[PHONE_1", "EMAIL_1]", "ada@example.org", "+49 30 1234567")


def ask(content: str) -> llm_os.Request:
    return llm_os.Request(model="sim:a", messages=[{"role": "user", "content": content}])


def registered(hook: Callable[..., None]) -> dict[str, Any]:
    """What a plugin registers, by name."""
    found: dict[str, Any] = {}
    hook(found.__setitem__, llm_os.Config())
    return found


class TestRedact(FilterConformance):
    cases = (
        *FilterConformance.cases,
        (ask(LETTER), LETTER),
        (ask(LETTER), f"I wrote to {', '.join(NAMED)}; nobody answered."),
    )

    def make(self) -> llm_os.Filter:
        from llm_os.plugins import redact

        return registered(redact.register_filters)["redact"]


@pytest.mark.parametrize("name", ["int8", "int4"], scope="class")
class TestQuantize(PassConformance):
    name: ClassVar[str]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def chosen(cls, name: str, smollm2: Path) -> None:
        cls.name, cls.model = name, str(smollm2)

    def make(self) -> llm_os.Pass:
        from llm_os.plugins import quantize

        return registered(quantize.register_passes)[self.name]


class TestCalculator(ToolConformance):
    arguments = ({"expression": "6 * 7"}, {"expression": "2 ** 0.5"})

    def make(self) -> llm_os.Tool:
        from llm_os.plugins.tools.examples import CALCULATOR

        return CALCULATOR


class TestClock(ToolConformance):
    def make(self) -> Any:
        from llm_os.plugins.tools.examples import CLOCK

        return CLOCK
