"""What the simulator says when the kernel has broken a promise."""

from __future__ import annotations


class Violation(Exception):
    """`kind` is the promise, a word or two; the same kind is looked for when a run is made shorter."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


def insist(truth: object, kind: str, what: object = "") -> None:
    if not truth:
        raise Violation(kind, str(what))
