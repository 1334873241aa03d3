"""A list of operations that several threads work through together. Knows no model: an operation is a record of numbers.

    operation   | code | items | rows of an item | fields ... |      64 bits each
    items       fixed x (rows of the batch / rows of an item, rounded up), or x the tiles of the batch

Every thread goes through the whole list. The items of an operation are cut into as many runs as there are threads, and
a thread takes its own run before it helps with others', so that rows tend to stay with one processor's caches. It goes
on when all of them are done, whoever did them. So a thread that comes late, or never, costs speed and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from llm_os.drivers.native.machine import I64, PTR, Function, Value, Variable

FIELDS = 16
_APART = 64  # bytes from one counter to the next: processors share memory by lines of so many
_SPINS = 4000  # looks at a counter before the processor is offered to others
_PROGRAM = (PTR, I64, PTR, PTR)  # where operations are, how many, where their counters are, and their state
ROWS, TILES = 0, 1  # state fields; further ones are in `rows` and `attention`


def program_bytes(threads: int) -> int:
    """Of an operation, with its counters."""
    return 8 * FIELDS + (1 + threads) * _APART


class Program:
    """Operations, with their counters and the state that they share."""

    def __init__(self, operations: Sequence[Sequence[int]], state: NDArray[np.int64], threads: int) -> None:
        """`operations` are records, filled up with zeros."""
        self._operations = np.zeros((len(operations), FIELDS), np.int64)
        for record, operation in zip(self._operations, operations, strict=True):
            record[: len(operation)] = operation
        self._state = state
        # How many items of each operation are done, and how many of each thread's run are taken.
        self.counters = np.zeros((len(operations), 1 + threads, _APART // 8), np.int64)
        place, counters, now = (array.ctypes.data for array in (self._operations, self.counters, state))
        self.record = (place, len(operations), counters, now)  # as _PROGRAM has it


def write_run(module: ir.Module, operations: Sequence[Function]) -> None:
    """`run(programs, count, threads, thread)`, one after another. `programs` are the `record`s of that many `Program`s.
    Operation i has code i of `operations`."""
    one = _write_program(module, operations)
    f = Function(module, "run", [PTR, I64, I64, I64], inner=False)
    programs, count, threads, thread = f.arguments
    with f.loop(0, count) as index:
        place = programs.at(index, 8 * len(_PROGRAM))
        f.call(one.raw, *(place.field(i, kind) for i, kind in enumerate(_PROGRAM)), threads, thread)
    f.end()


def _write_program(module: ir.Module, operations: Sequence[Function]) -> Function:
    f = Function(module, "program", [*_PROGRAM, I64, I64])
    program, count, counters, state, threads, thread = f.arguments
    with f.loop(0, count) as index:
        op = program.at(index, 8 * FIELDS)
        done = counters.at(index * (threads + 1), _APART)
        items = Variable(f.constant(0, I64))
        each = op.field(2, I64)
        with f.when(each > 0):
            items.set(op.field(1, I64) * ((state.field(ROWS, I64) + each - 1) // each))
        with f.when(each <= 0):
            items.set(op.field(1, I64) * state.field(TILES, I64))
        total = items.get()
        with f.loop(thread, thread + threads) as helped:
            run = helped % threads
            first, end = total * run // threads, total * (run + 1) // threads
            taken = done.at(run + 1, _APART)
            with f.forever() as leave_if:
                leave_if(first + _now(f, taken) >= end)  # most often so for others' runs; adding takes the line away
                item = first + _add(f, taken, 1)
                leave_if(item >= end)
                _dispatch(f, operations, op, item, state)
                _add(f, done, 1)
        _await(f, done, total)
    f.end()
    return f


def _dispatch(f: Function, operations: Sequence[Function], op: Value, item: Value, state: Value) -> None:
    build = f.builder
    after = f.raw.append_basic_block("performed")
    switch = build.switch(op.field(0, I64).raw, after)
    for code, operation in enumerate(operations):
        block = f.raw.append_basic_block(operation.raw.name)
        switch.add_case(I64(code), block)
        build.position_at_end(block)
        f.call(operation.raw, op, item, state)
        build.branch(after)
    build.position_at_end(after)


def _now(f: Function, counter: Value) -> Value:
    return Value(f, f.builder.load_atomic(counter.raw, "acquire", 8, typ=I64))


def _add(f: Function, counter: Value, number: int) -> Value:
    return Value(f, f.builder.atomic_rmw("add", counter.raw, I64(number), "acq_rel"))


def _await(f: Function, counter: Value, number: Value) -> None:
    rest = ir.Function(f.module, ir.FunctionType(ir.IntType(32), []), "sched_yield")
    spins = Variable(f.constant(0, I64))
    with f.forever() as leave_if:
        leave_if(_now(f, counter) >= number)
        spins.set(spins.get() + 1)
        with f.when(spins.get() > _SPINS):
            f.builder.call(rest, [])
            spins.set(f.constant(0, I64))
