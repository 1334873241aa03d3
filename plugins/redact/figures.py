"""How well personal data is found in texts that people have labelled: precision, recall and F1 of each kind.

A sample is a line of JSON, {"text": "...", "spans": [[start, end, "EMAIL"], ...]}. A span counts as found if kind,
start and end are right; beside it stands the share of the labelled characters that is covered by
anything: the rest leaks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from llm_os import RequestError
from llm_os.plugins.redact.finder import Span


class Sample(Struct, frozen=True):
    text: str
    spans: list[tuple[int, int, str]] = []


class Figures(Struct):
    """Of one kind."""

    right: int = 0
    wrong: int = 0  # found, and not there
    missed: int = 0
    characters: int = 0  # of the labelled spans
    covered: int = 0  # of these, by a span of whatever kind

    @property
    def precision(self) -> float:
        return self.right / (self.right + self.wrong) if self.right + self.wrong else 1.0

    @property
    def recall(self) -> float:
        return self.right / (self.right + self.missed) if self.right + self.missed else 1.0

    @property
    def f1(self) -> float:
        return 2 * self.right / max(1, 2 * self.right + self.wrong + self.missed)


def read(path: Path) -> list[Sample]:
    """Raises RequestError, which names the line."""
    samples = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            samples.append(msgspec.json.decode(line, type=Sample))
        except msgspec.DecodeError as error:
            raise RequestError(f"{path}, line {number}: {error}; a line is {{'text': ..., 'spans': [...]}}") from None
    return samples


def measure(samples: Iterable[Sample], find: Callable[[str], list[Span]]) -> dict[str, Figures]:
    """By kind, and "all"."""
    figures: dict[str, Figures] = defaultdict(Figures)
    for sample in samples:
        found = find(sample.text)
        labelled = {tuple(span) for span in sample.spans}
        for span in {tuple(span) for span in found} | labelled:
            for each in (figures[str(span[2])], figures["all"]):
                if span not in labelled:
                    each.wrong += 1
                elif span in {tuple(each) for each in found}:
                    each.right += 1
                else:
                    each.missed += 1
        for start, end, kind in sample.spans:
            covered = sum(max(0, min(end, span.end) - max(start, span.start)) for span in found)
            for each in (figures[kind], figures["all"]):
                each.characters += end - start
                each.covered += covered
    return dict(figures)


def table(figures: dict[str, Figures]) -> str:
    lines = [f"{'kind':<14}{'labelled':>9}{'precision':>11}{'recall':>8}{'F1':>7}{'covered':>9}"]
    for kind in sorted(figures, key=lambda kind: (kind == "all", kind)):
        each = figures[kind]
        covered = each.covered / each.characters if each.characters else 1.0
        scores = f"{each.precision:>11.3f}{each.recall:>8.3f}{each.f1:>7.3f}{covered:>9.3f}"
        lines.append(f"{kind:<14}{each.right + each.missed:>9}{scores}")
    return "\n".join(lines)
