"""The product of `groups` for many rows, with the instructions for matrices (AMX) of processors that have them.

One instruction multiplies 16 activation rows and 16 weight rows over a group. Its sums are of integers, and what
follows is what `groups` does with them, in the same order: so the bits are the same, and which of the two is used may
depend on the number of rows.

The sums reach floating point through memory, and reading them back at once would wait for all that writes them. So a
group is multiplied before the sums of the last one are added up:

    multiply 0 | multiply 1, add 0 | multiply 2, add 1 | ...
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
    finish,
)
from llm_os.drivers.native.machine import F32, I8, I32, I64, LANES, PTR, Function, Value, Variable, vector
from llm_os.drivers.native.processor import Processor

_SPAN = 64  # groups of a block that are unpacked at a time: 44 kB, which stay near
_FLOATS = vector(F32)
_SUMS, _ROWS, _COLUMNS = (0, 1), (2, 3), (4, 5)  # registers: rows x 16 integers, rows x 32, 8 x 16 columns of 4
_CODES, _NUMBERS = 64 * 8, 64 * 3  # bytes of an unpacked group of a block


def begin_tiles(f: Function) -> None:
    """Say how large each register's matrix is, to the thread's processor."""
    words = [1] + [0] * 63  # the first of the palettes
    for registers, height, width in ((_SUMS, LANES, 64), (_ROWS, LANES, GROUP), (_COLUMNS, GROUP // 4, 64)):
        for register in registers:
            words[16 + 2 * register], words[48 + register] = width, height
    place = f.local(64)
    place.store(Value(f, ir.Constant(vector(I8, 64), words)))
    f.instruction("llvm.x86.ldtilecfg", place)


def end_tiles(f: Function) -> None:
    f.instruction("llvm.x86.tilerelease")


def write_tiles(module: ir.Module, processor: Processor, kind: Kind, most: int) -> Function:
    """One block times a multiple of 16 rows, `most` of them at most, which the last argument counts; the others are
    those of `matrix`'s tiles."""
    f = Function(module, f"tiles_{kind}", [PTR] * 5 + [I64] * 4)
    block, codes, terms, out, bias, groups, width, adds, rows = f.arguments
    unpacked, numbers, partial = f.local(_SPAN * _CODES), f.local(_SPAN * _NUMBERS), f.local(most * 64)
    sums = f.local(len(_SUMS) * LANES * 64)

    def multiply(group: Value, code: Value, way: int) -> None:
        _multiply(code, unpacked.at(group, _CODES), sums.at(way * LANES * 64), way)

    def add(group: Value, term: Value, way: int, totals: list[Variable]) -> None:
        d, m, total = (numbers.at(group, _NUMBERS).at(64 * j).load(_FLOATS) for j in range(3))
        for i, each in enumerate(totals):
            products = sums.at(way * LANES * 64 + 64 * i).load(vector(I32)).to(_FLOATS)
            add_products(each, products, d, m, total, term.at(TERM_BYTES * i))

    with f.loop(0, groups, _SPAN) as start:
        count = f.minimum(groups - start, _SPAN)
        with f.loop(0, count) as group:
            weights = WeightGroup(processor, block.at(start + group, GROUP_BYTES[kind]), kind)
            weights.keep(unpacked.at(group, _CODES), numbers.at(group, _NUMBERS))
        with f.loop(0, rows, LANES) as row:
            totals = [Variable(bias.load(_FLOATS)) for _ in range(LANES)]
            with f.when(start > 0):
                for i, total in enumerate(totals):
                    total.set(partial.at(row + i, 64).load(_FLOATS))
            first = groups * (row // LANES) + start
            code, term = codes.at(first, CODES_BYTES), terms.at(first, TERMS_BYTES)
            with f.loop(0, count + 1, 2) as base:
                for way in range(2):
                    group = base + way
                    with f.when(group < count):
                        multiply(group, code.at(group, CODES_BYTES), way)
                    with f.when((group - 1).within(count)):
                        add(group - 1, term.at(group - 1, TERMS_BYTES), 1 - way, totals)
            with f.when(start + _SPAN >= groups):
                finish(totals, out.at(row * width, 4), width, adds)
            with f.when(start + _SPAN < groups):
                for i, total in enumerate(totals):
                    partial.at(row + i, 64).store(total.get())
    f.end()
    return f


def _multiply(codes: Value, weights: Value, out: Value, way: int) -> None:
    """16 rows of codes times 16 columns of weights: 16 rows of 16 sums into `out`. `way` is 0 or 1, in turns."""
    f = codes.function
    sums, rows, columns = (f.constant(each[way], I8) for each in (_SUMS, _ROWS, _COLUMNS))
    line, stride = f.constant(64, I64), f.constant(GROUP, I64)
    f.instruction("llvm.x86.tilezero", sums)
    f.instruction("llvm.x86.tileloadd64", rows, codes, stride)
    f.instruction("llvm.x86.tileloadd64", columns, weights, line)
    f.instruction("llvm.x86.tdpbsud", sums, rows, columns)
    f.instruction("llvm.x86.tilestored64", sums, out, line)
