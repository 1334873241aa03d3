"""Weights in groups of 32, and their product with rows of 8-bit integers. Knows no model.

A group is 32 consecutive columns of a row. A weight in it is d * w + m, an activation s * x + o, where w and x are
small integers; d and m are what GGML's Q4_1 and Q8_0 have, s and o fit the group's least and greatest value. So

    out[row] = sum over groups, in order, of   d * s * sum(w * x)  +  m * s * sum(x)  +  o * (d * sum(w) + 32 * m)

has exact sums of integers, and its few floating-point operations always come in the same order: a row gives the same
bits alone and in any batch, with any number of threads, on any processor with the same rounding. (Steps between the
least and the greatest value, rather than around zero, halve the error: groups tend to have an outlier on one side.)

16 rows of a matrix are a block, whose groups lie one after another, ready to be multiplied 16 at a time:

    4 bits   | codes: 4 x 64 bytes, byte b of lane i in vector j: columns 4j+b (low half) and 16+4j+b of row i | d | m |
    8 bits   | codes: 8 x 64 bytes, byte b of lane i in vector j: column 4j+b of row i, plus 128               | d |

d and m are 16 float16 numbers each in "Q4", float32 in "Q4F" and "Q8".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from llvmlite import ir

from llm_os.drivers.native.machine import F16, F32, I8, I32, I64, LANES, PTR, Function, Value, Variable, vector
from llm_os.drivers.native.processor import Processor

GROUP = 32
Kind = Literal["Q4", "Q4F", "Q8"]
GROUP_BYTES: dict[Kind, int] = {"Q4": 256 + 64, "Q4F": 256 + 128, "Q8": 512 + 64}  # of one group of a block
_TILES = (8, 4, 2, 1)  # activation rows that share one reading of a block
TERMS_BYTES = 12  # of a group of an activation row
ROWS = 64  # activation rows of one item of work
_FLOATS, _BYTES = vector(F32), vector(I8, 4 * LANES)


def write_product(module: ir.Module, processor: Processor, kind: Kind) -> Function:
    """The operation `product`: some blocks of a matrix times some rows, into float32.

    Fields: codes, terms, weights, out, groups, blocks, blocks of an item, floats of an `out` row, whether to add to
    `out`, bias, its bytes a block (0 where there is none).
    State: 0 rows.
    """
    tiles = {rows: _write_tile(module, processor, kind, rows) for rows in _TILES}
    f = Function(module, f"product_{kind}", [PTR, I64, PTR])
    op, item, state = f.arguments
    codes, terms, weights, out = (op.field(i, PTR) for i in range(3, 7))
    groups, blocks, chunk, width, adds = (op.field(i, I64) for i in range(7, 12))
    bias, bias_step = op.field(12, PTR), op.field(13, I64)
    rows = state.field(0, I64)
    chunks = op.field(1, I64)
    first, start = item % chunks * chunk, item // chunks * ROWS
    stop = f.minimum(start + ROWS, rows)
    with f.loop(first, f.minimum(first + chunk, blocks)) as block:
        row = Variable(start)
        for count in _TILES:
            with f.forever() as leave_if:
                at = row.get()
                leave_if(at + count > stop)
                f.call(
                    tiles[count].raw,
                    weights.at(block * groups, GROUP_BYTES[kind]),
                    codes.at(at * groups, GROUP),
                    terms.at(at * groups, TERMS_BYTES),
                    out.at(at * width, 4).at(block, 4 * LANES),
                    bias.at(block * bias_step),
                    groups,
                    width,
                    adds,
                )
                row.set(at + count)
    f.end()
    return f


def _write_tile(module: ir.Module, processor: Processor, kind: Kind, rows: int) -> Function:
    """One block times `rows` rows."""
    f = Function(module, f"tile_{kind}_{rows}", [PTR] * 5 + [I64] * 3)
    block, codes, terms, out, bias, groups, width, adds = f.arguments
    totals = [Variable(bias.load(_FLOATS)) for _ in range(rows)]
    nothing, ones = f.constant(0, vector(I32)), f.constant(0x01010101, vector(I32))
    with f.loop(0, groups) as group:
        weights, d, m = _read_group(f, block.at(group, GROUP_BYTES[kind]), kind)
        whole = f.fma(d, processor.dot(weights, [ones] * len(weights), nothing).to(_FLOATS), m * float(GROUP))
        for i in range(rows):
            place = groups * i + group
            row, term = codes.at(place, GROUP), terms.at(place, TERMS_BYTES)
            s, sums, o = (term.at(each, 4).load(F32).spread() for each in range(3))
            integers = [row.at(4 * j).load(I32).spread() for j in range(len(weights))]
            products = processor.dot(weights, integers, nothing).to(_FLOATS)
            total = f.fma(d, products * s, totals[i].get())
            totals[i].set(f.fma(whole, o, f.fma(m, sums, total)))
    for i, sum_ in enumerate(totals):
        place = out.at(width * i, 4)
        with f.when(adds > 0):
            sum_.set(sum_.get() + place.load(_FLOATS))
        place.store(sum_.get())
    f.end()
    return f


def _read_group(f: Function, part: Value, kind: Kind) -> tuple[list[Value], Value, Value]:
    """The codes of a group of one block, from 0 to 255, and d and m."""
    if kind == "Q8":
        d = part.at(512).load(_FLOATS)
        return [part.at(64 * j).load(_BYTES) for j in range(8)], d, d * -128.0
    pairs = [part.at(64 * j).load(_BYTES) for j in range(4)]
    number = vector(F16) if kind == "Q4" else _FLOATS
    d, m = (part.at(256 + i * (GROUP_BYTES[kind] - 256) // 2).load(number).to(_FLOATS) for i in range(2))
    return [pair & 15 for pair in pairs] + [pair >> 4 for pair in pairs], d, m


def write_quantized(
    f: Function, groups: Value, pair: Callable[[Value], tuple[Value, Value]], codes: Value, terms: Value
) -> None:
    """Round `pair(group)`, the two vectors of each group of one row, to the 256 steps from its least to its greatest.

    Codes are from -128 to 127; a group's terms are s, s times the sum of its codes, and o. A row with NaN or infinity
    gets terms of NaN, so that all that comes of it is NaN.
    """
    unsound = Variable(f.constant(0.0, _FLOATS))
    with f.loop(0, groups) as group:
        low, high = pair(group)
        unsound.set(unsound.get() + ((low - low) + (high - high)))
        least, greatest = f.least(f.minimum(low, high)), f.largest(f.maximum(low, high))
        s = (greatest - least) / 255.0
        inverse = (s > 0.0).where(1.0 / s, f.constant(0.0, F32)).spread()
        whole = [f.rounded((half - least.spread()) * inverse).to(vector(I32)) - 128 for half in (low, high)]
        codes.at(group, GROUP).store(whole[0].to(vector(I8)))
        codes.at(group, GROUP).at(LANES).store(whole[1].to(vector(I8)))
        total = f.total(whole[0] + whole[1]).to(F32)
        for i, term in enumerate((s, s * total, f.fma(s, f.constant(128.0, F32), least))):
            terms.at(group, TERMS_BYTES).at(i, 4).store(term)
    with f.when(f.total(unsound.get()).differs(0.0)), f.loop(0, groups * (TERMS_BYTES // 4)) as each:
        terms.at(each, 4).store(f.constant(float("nan"), F32))
