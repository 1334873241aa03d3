"""`llm-os quantize`: makes the report, prints it, and keeps it if it is within the limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter

import llm_os
from llm_os.plugins.quantize.records import Records
from llm_os.plugins.quantize.report import POSITIONS, Figures, Report, compare, shipped_texts

_LARGEST = 4 << 20  # bytes of a text


def quantize(
    model: str,
    /,
    *,
    compression: Annotated[Literal["int8", "int4"], Parameter(name="--with")] = "int8",
    perplexity: float = 5.0,
    agreement: float = 85.0,
    text: Path | None = None,
    positions: int = POSITIONS,
    precision: Literal["fast", "exact"] = "fast",
    memory: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Compare a model with itself in 8 or 4 bits, and keep what is good enough. Exit code 1 if it is not.

    Parameters
    ----------
    model
        What `llm-os run` takes; it must be there already.
    compression
        int8 or int4.
    perplexity
        Keep it if perplexity rises by no more than so many percent.
    agreement
        Keep it if both choose the same next token at least so often, in percent.
    text
        Compare on this text, in UTF-8, instead of the shipped ones.
    positions
        How many tokens to predict, at most.
    precision
        Compare them at this precision.
    memory
        What may be used, such as 2GiB.
    json
        Print one JSON object.
    """
    if not (0 <= perplexity <= 1e6 and 0 <= agreement <= 100 and 1 <= positions <= 10**6):
        raise llm_os.RequestError("--perplexity must be 0 or more, --agreement 0 to 100, --positions 1 to 1000000")
    options = {"quantize": {"remind": False}}
    config = llm_os.Config(plugins=("quantize",), precision=precision, memory=memory, options=options)
    path = llm_os.Store(config.store).resolve(model)
    texts = shipped_texts() if text is None else {text.name: _read(text)}
    report = compare(model, compression, texts, positions, config)
    missed = missing(report.total, perplexity, agreement)
    records = Records.of(config)
    place = None
    if missed:
        records.forget(path, compression)  # what was kept before holds no longer
    else:
        place = records.keep(path, report)
    if json:
        whole = msgspec.to_builtins(report) | {"kept": not missed, "missing": missed, "record": place and str(place)}
        print(msgspec.json.encode(whole).decode())
    else:
        print("\n".join(_lines(report)))
        print(f"not kept: {'; '.join(missed)}" if missed else f"kept: {model}+{compression} can be used as it is")
    return 1 if missed else 0


def missing(figures: Figures, perplexity: float, agreement: float) -> list[str]:
    """What is outside the limits (in percent), a sentence for each, with the way out."""
    found = []
    if not figures.increase * 100 <= perplexity:  # NaN is outside
        found.append(
            f"perplexity rises by {figures.increase:.1%}, the limit is {perplexity:g}%; "
            f"use more bits, or --perplexity {_above(figures.increase * 100)}"
        )
    if not figures.agreement * 100 >= agreement:
        found.append(
            f"the same next token in {figures.agreement:.1%}, the limit is {agreement:g}%; "
            f"use more bits, or --agreement {_below(figures.agreement * 100)}"
        )
    return found


def _above(value: float) -> int:
    return math.floor(value) + 1 if math.isfinite(value) else 10**6


def _below(value: float) -> int:
    return math.floor(value) if math.isfinite(value) else 0


def _lines(report: Report) -> list[str]:
    rows = [("", "positions", "perplexity", "", "change", "same choice", "KL")]
    for name, each in (*report.texts.items(), ("all", report.total)):
        rows.append(
            (
                name,
                str(each.positions),
                f"{each.perplexity_before:.3f}",
                f"{each.perplexity_after:.3f}",
                f"{each.increase:+.2%}",
                f"{each.agreement:.1%}",
                f"{each.kl:.4f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    before, after = report.bytes_before, report.bytes_after
    weights = f"weights on the device: {before:,} bytes before, {after:,} after ({after / before:.0%})"
    if after >= before:
        weights += f"; at this precision {report.model} takes no more as it is"
    return [f"{report.model}+{report.compression}, {report.precision}, {report.device}", *table, weights]


def _read(text: Path) -> str:
    try:
        if text.stat().st_size > _LARGEST:
            raise llm_os.RequestError(f"{text} is larger than {_LARGEST} bytes; give a part of it")
        return text.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise llm_os.RequestError(f"{text} is not UTF-8 at byte {error.start}; convert it first") from None
    except OSError as error:
        raise llm_os.RequestError(f"{text}: {error.strerror or error}") from None
