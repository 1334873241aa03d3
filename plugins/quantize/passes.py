"""The passes: which matrix of a model is held in which type. Knows no arithmetic: `llm_os.change_weights` has it."""

from __future__ import annotations

import logging
from functools import cache

from llm_os import Image, Unsupported, change_weights, weight_matrices
from llm_os.plugins.quantize.records import Records

PASSES = ("int8", "int4")
_HEAD = "output.weight"
_GROUP = 32  # values that share a scale, in both types
_log = logging.getLogger("llm_os.plugins.quantize")


def types(matrices: dict[str, tuple[int, int]], name: str) -> dict[str, str]:
    """The type for each matrix whose rows are a multiple of 32. int8: 8 bits. int4: 4 bits; the head, whose errors
    nothing smooths out, has 8. Other matrices, embedding, norms and biases stay as they are."""
    return {
        matrix: "Q4_1" if name == "int4" and matrix != _HEAD else "Q8_0"
        for matrix, (_, columns) in matrices.items()
        if columns % _GROUP == 0
    }


class Quantize:
    """One pass. A model without a kept report is quantized all the same, and the log says so once."""

    def __init__(self, name: str, records: Records | None) -> None:
        """`records` is None where nobody shall be reminded."""
        self._name = name
        self._records = records

    def apply(self, image: Image) -> Image:
        kept = types(weight_matrices(image), self._name)
        if not kept:
            raise Unsupported(
                f"{image.name}+{self._name}: no matrix has rows of a multiple of {_GROUP} values; use it as it is"
            )
        changed = change_weights(image, kept=kept)
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
