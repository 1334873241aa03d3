"""The passes: which matrix of a model is held in which type. Knows no arithmetic: `llm_os.change_weights` has it."""

from __future__ import annotations

import logging
from functools import cache

from llm_os import Image, change_weights, weight_matrices
from llm_os.plugins.quantize.records import Records

PASSES = ("int8", "int4")
_HEAD = "output.weight"
_log = logging.getLogger("llm_os.plugins.quantize")


def types(matrices: dict[str, tuple[int, int]], name: str) -> dict[str, str]:
    """The type for each matrix. int8: 8 bits, one scale a row, rotated where the rows allow it. int4: 4 bits in groups
    of 32; the head, whose errors nothing smooths out, has 8. Embedding, norms and biases stay as they are."""
    chosen = {}
    for matrix, (_, columns) in matrices.items():
        wide = "INT8_ROW_H64" if columns % 64 == 0 else "INT8_ROW"
        chosen[matrix] = "Q4_1" if name == "int4" and matrix != _HEAD and columns % 32 == 0 else wide
    return chosen


class Quantize:
    """One pass. A model without a kept report is quantized all the same, and the log says so once."""

    def __init__(self, name: str, records: Records | None) -> None:
        """`records` is None where nobody shall be reminded."""
        self._name = name
        self._records = records

    def apply(self, image: Image) -> Image:
        changed = change_weights(image, kept=types(weight_matrices(image), self._name))
        if self._records is not None and not self._records.kept(image, self._name):
            remind(image.name, self._name)
        return changed


@cache
def remind(model: str, name: str) -> None:
    """Once in a process: one command may open a model several times."""
    _log.warning(
        "%s+%s runs without a kept report of its quality: llm-os quantize %s --with %s makes one",
        *(model, name) * 2,
    )
