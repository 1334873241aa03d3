"""The product of `matrix` for 16 rows and more, in the instructions for matrices (AMX) of processors that have them.

One instruction multiplies 16 activation rows and 16 weight rows over a group. Its sums are of integers, and what
follows is what `matrix` does with them, in the same order: so the bits are the same, and which of the two is used may
depend on the number of rows.
"""

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
    add_products,
)
from llm_os.drivers.native.machine import F32, I8, I32, I64, LANES, PTR, Function, Value, Variable, vector
from llm_os.drivers.native.processor import Processor

ROWS = 64  # activation rows of one item of work
_SPAN = 64  # groups of a block that are unpacked at a time: 44 kB, which stay near
_FLOATS = vector(F32)
_BATCH = 12  # groups whose sums are written before the first are read: reading at once would wait for the writing
_SUMS, _ROWS, _COLUMNS = (0, 1, 2, 3), (4, 5), (6, 7)  # registers: 16 x 16 integers, 16 rows x 32, 8 x 16 columns of 4


def begin_tiles(f: Function) -> None:
    """Say how large each register's matrix is, to the thread's processor."""
    shapes = {_SUMS: (16, 64), _ROWS: (16, GROUP), _COLUMNS: (8, 64)}
    words = [1] + [0] * 63  # the first of the palettes
    for registers, (rows, columns) in shapes.items():
        for register in registers:
            words[16 + 2 * register], words[48 + register] = columns, rows
    place = f.local(64)
    place.store(Value(f, ir.Constant(vector(I8, 64), words)))
    f.instruction("llvm.x86.ldtilecfg", place)


def end_tiles(f: Function) -> None:
    f.instruction("llvm.x86.tilerelease")


def write_tiles(module: ir.Module, processor: Processor, kind: Kind) -> Function:
    """One block times a multiple of 16 rows, at most ROWS, which the last argument counts; else as `matrix`'s tiles."""
    f = Function(module, f"tiles_{kind}", [PTR] * 5 + [I64] * 4)
    block, codes, terms, out, bias, groups, width, adds, rows = f.arguments
    unpacked, numbers, partial = f.local(_SPAN * 512), f.local(_SPAN * 192), f.local(ROWS * 64)
    sums = f.local(_BATCH * 1024)
    with f.loop(0, groups, _SPAN) as start:
        count = f.minimum(groups - start, _SPAN)
        with f.loop(0, count) as group:
            weights = WeightGroup(processor, block.at(start + group, GROUP_BYTES[kind]), kind)
            for j, codes_ in enumerate(weights.codes):
                unpacked.at(group, 512).at(64 * j).store(codes_)
            for j, number in enumerate((weights.d, weights.m, weights.sums)):
                numbers.at(group, 192).at(64 * j).store(number)
        with f.loop(0, rows, LANES) as row:
            totals = [Variable(bias.load(_FLOATS)) for _ in range(LANES)]
            with f.when(start > 0):
                for i, total in enumerate(totals):
                    total.set(partial.at(row + i, 64).load(_FLOATS))

            with f.loop(0, count, _BATCH) as first:
                end = f.minimum(first + _BATCH, count)
                place = groups * (row // LANES) + start

                def place_of(group: Value, place: Value = place, first: Value = first) -> tuple[Value, Value, Value]:
                    into = sums.at(group - first, 1024)
                    return codes.at(place + group, CODES_BYTES), unpacked.at(group, 512), into

                fours = first + (end - first) // 4 * 4
                with f.loop(first, fours, 4) as group:
                    _multiply(f, [place_of(group + i) for i in range(4)])
                with f.loop(fours, end) as group:
                    _multiply(f, [place_of(group)])
                with f.loop(first, end) as group:
                    d, m, total_ = (numbers.at(group, 192).at(64 * j).load(_FLOATS) for j in range(3))
                    products = sums.at(group - first, 1024)
                    of_group = terms.at(place + group, TERMS_BYTES)
                    for i, total in enumerate(totals):
                        of_row = products.at(64 * i).load(vector(I32)).to(_FLOATS)
                        add_products(total, of_row, d, m, total_, of_group.at(TERM_BYTES * i))
            with f.when(start + _SPAN >= groups):
                finish(totals, out.at(row * width, 4), width, adds)
            with f.when(start + _SPAN < groups):
                for i, total in enumerate(totals):
                    partial.at(row + i, 64).store(total.get())
    f.end()
    return f


def finish(totals: list[Variable], out: Value, width: Value, adds: Value) -> None:
    """Write down the totals of consecutive rows, added to what is there if `adds` is not 0."""
    f = out.function
    places = [out.at(width * i, 4) for i in range(len(totals))]
    with f.when(adds > 0):
        for total, place in zip(totals, places, strict=True):
            total.set(total.get() + place.load(_FLOATS))
    for total, place in zip(totals, places, strict=True):
        place.store(total.get())


def _multiply(f: Function, groups: list[tuple[Value, Value, Value]]) -> None:
    """16 rows of codes times 16 columns of weights, into 16 x 16 sums: of up to 4 groups, none of which waits for
    another."""
    line, stride = f.constant(64, I64), f.constant(GROUP, I64)
    registers = [
        tuple(f.constant(each[i % len(each)], I8) for each in (_SUMS, _ROWS, _COLUMNS)) for i in range(len(groups))
    ]
    for (codes, weights, _), (sums, rows, columns) in zip(groups, registers, strict=True):
        f.instruction("llvm.x86.tilezero", sums)
        f.instruction("llvm.x86.tileloadd64", rows, codes, stride)
        f.instruction("llvm.x86.tileloadd64", columns, weights, line)
        f.instruction("llvm.x86.tdpbsud", sums, rows, columns)
    for (_, _, out), (sums, _, _) in zip(groups, registers, strict=True):
        f.instruction("llvm.x86.tilestored64", sums, out, line)
