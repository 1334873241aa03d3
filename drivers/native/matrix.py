"""The operation that multiplies a matrix and rows of 8-bit integers. `groups` says what that is. Knows no model."""

from __future__ import annotations

from llvmlite import ir

from llm_os.drivers.native.groups import (
    CODES_BYTES,
    GROUP,
    GROUP_BYTES,
    TERM_BYTES,
    TERMS_BYTES,
    Kind,
    WeightGroup,
    row_at,
)
from llm_os.drivers.native.machine import F32, I64, LANES, PTR, Function, Variable, vector
from llm_os.drivers.native.processor import Processor

_TILES = (8, 4, 2, 1)  # activation rows that share one reading of a block
ROWS = 64  # activation rows of one item of work
_FLOATS = vector(F32)


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
                    *row_at(codes, terms, groups, at),
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
    with f.loop(0, groups) as group:
        weights = WeightGroup(processor, block.at(group, GROUP_BYTES[kind]), kind)
        for i, total in enumerate(totals):
            row = codes.at(group, CODES_BYTES).at(GROUP * i)
            weights.add_to(total, row, terms.at(group, TERMS_BYTES).at(TERM_BYTES * i))
    places = [out.at(width * i, 4) for i in range(rows)]
    with f.when(adds > 0):
        for total, place in zip(totals, places, strict=True):
            total.set(total.get() + place.load(_FLOATS))
    for total, place in zip(totals, places, strict=True):
        place.store(total.get())
    f.end()
    return f
