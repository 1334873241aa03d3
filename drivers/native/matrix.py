"""The operation that multiplies a matrix and rows of 8-bit integers. `groups` says what that is. Knows no model."""

from __future__ import annotations

from contextlib import AbstractContextManager

from llvmlite import ir

from llm_os.drivers.native.groups import (
    CODES_BYTES,
    GROUP,
    GROUP_BYTES,
    TERM_BYTES,
    TERMS_BYTES,
    Kind,
    WeightGroup,
    finish,
    row_at,
)
from llm_os.drivers.native.machine import F32, I64, LANES, PTR, Function, Value, Variable, vector
from llm_os.drivers.native.processor import Processor
from llm_os.drivers.native.tiles import begin_tiles, end_tiles, write_tiles

_MANY = 48  # from which on it is quicker to multiply matrices, where the processor can
ROWS = 64  # activation rows of one item of work
_FLOATS = vector(F32)


def write_product(module: ir.Module, processor: Processor, kind: Kind) -> Function:
    """The operation `product`: some blocks of a matrix times some rows, into float32.

    Fields: codes, terms, weights, out, groups, blocks, blocks of an item, floats of an `out` row, whether to add to
    `out`, bias, its bytes a block (0 where there is none).
    State: 0 rows.
    """
    few = {rows: _write_tile(module, processor, kind, rows) for rows in _few(processor)}
    many = write_tiles(module, processor, kind, ROWS) if processor.has_tiles else None
    f = Function(module, f"product_{kind}", [PTR, I64, PTR])
    op, item, state = f.arguments
    codes, terms, weights, out = (op.field(i, PTR) for i in range(3, 7))
    groups, blocks, chunk, width, adds = (op.field(i, I64) for i in range(7, 12))
    bias, bias_step = op.field(12, PTR), op.field(13, I64)
    rows = state.field(0, I64)
    chunks = op.field(1, I64)
    first, start = item % chunks * chunk, item // chunks * ROWS
    stop = f.minimum(start + ROWS, rows)
    done = Variable(start)

    def multiply(tile: Function, block: Value, row: Value, *count: Value) -> None:
        f.call(
            tile.raw,
            weights.at(block * groups, GROUP_BYTES[kind]),
            *row_at(codes, terms, groups, row),
            out.at(row * width, 4).at(block, 4 * LANES),
            bias.at(block * bias_step),
            groups,
            width,
            adds,
            *count,
        )

    def blocks_of_item() -> AbstractContextManager[Value]:
        return f.loop(first, f.minimum(first + chunk, blocks))

    if many is not None:
        whole = (stop - start) // LANES * LANES
        with f.when(whole >= _MANY):
            begin_tiles(f)
            with blocks_of_item() as block:
                multiply(many, block, start, whole)
            end_tiles(f)
            done.set(start + whole)
    with f.when(done.get() < stop), blocks_of_item() as block:
        next_row = Variable(done.get())
        for count, tile in few.items():
            with f.forever() as leave_if:
                row = next_row.get()
                leave_if(row + count > stop)
                multiply(tile, block, row)
                next_row.set(row + count)
    f.end()
    return f


def _few(processor: Processor) -> tuple[int, ...]:
    """How many activation rows share one reading of a block: as many as there are registers for. Each number takes time
    to compile."""
    return (16, *range(8, 0, -1)) if "+avx512vnni" in processor.features else (8, 4, 2, 1)


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
    finish(totals, out, width, adds)
    f.end()
    return f
