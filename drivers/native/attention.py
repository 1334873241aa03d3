"""Attention over pages of float16 keys and values. Knows pages and positions; no weights, no model.

    keys     | block of 16 tokens: head_dim x 16 | block | ...     a token for each lane: scores need no sums of lanes
    values   | token: head_dim | token | ...

A query goes through the blocks of 16 positions in order, with a running maximum and sum (Milakov and Gimelshein 2018).
The order depends on positions alone, and what is masked adds exact zeros, so a query gives the same bits whoever shares
its batch and however its prompt was cut. Pages are read where they lie.
"""

from __future__ import annotations

from llvmlite import ir

from llm_os.drivers.native.machine import F16, F32, I32, I64, LANES, PTR, Function, Value, Variable, vector
from llm_os.drivers.native.rows import exp2

TILE = 16  # positions of one sequence that share one reading of its keys
_FLOATS = vector(F32)
_LOWEST = -3.0e38  # a running maximum before any score: finite, so that differences are never NaN
_REGISTERS = 24  # for the outputs of the queries that share one reading


def shares(head_dim: int, group: int) -> tuple[int, int]:
    """How many queries go through the keys together: as many as registers hold, and a number that always fits."""
    most = max(1, _REGISTERS // (head_dim // LANES))
    least = max(count for count in range(1, group + 1) if group % count == 0 and count <= most)
    return least * (most // least), least


def write_attention(module: ir.Module, head_dim: int, group: int) -> Function:
    """One tile's queries, those of one key head.

    Fields: queries, floats of their row, out, floats of its row, address of the layer's keys, of its values, bytes from
    one head to the next, window, tokens of a page, key heads.
    State: 4 the tiles, four numbers each: first row, rows, position of the first, where its pages stand in 5; 5 where
    pages begin, in numbers from the start.
    """
    most, least = shares(head_dim, group)
    inner = {count: _write_queries(module, head_dim, group, count) for count in {most, least}}
    f = Function(module, f"attention_{head_dim}_{group}", [PTR, I64, PTR])
    op, item, state = f.arguments
    kv_heads = op.field(1, I64)
    tile, head = state.field(4, PTR).at(item // kv_heads, 32), item % kv_heads
    first, rows, position, table = (tile.field(i, I64) for i in range(4))
    queries = op.field(3, PTR).at(first * op.field(4, I64) + head * (group * head_dim), 4)
    out = op.field(5, PTR).at(first * op.field(6, I64) + head * (group * head_dim), 4)
    offset = head * op.field(9, I64)
    keys, values = op.field(7, PTR).at(offset), op.field(8, PTR).at(offset)
    pages = state.field(5, PTR).at(table, 8)
    done, total = Variable(f.constant(0, I64)), rows * group
    for count in dict.fromkeys((most, least)):
        with f.forever() as leave_if:
            at = done.get()
            leave_if(at + count > total)
            f.call(inner[count].raw, op, at, position, queries, out, keys, values, pages)
            done.set(at + count)
    f.end()
    return f


def _write_queries(module: ir.Module, head_dim: int, group: int, count: int) -> Function:
    """`count` queries, from the tile's query `first` on; query i is head i % group of row i // group."""
    f = Function(module, f"queries_{head_dim}_{group}_{count}", [PTR, I64, I64] + [PTR] * 5)
    op, first, position, queries, out, keys, values, pages = f.arguments
    query_width, out_width, window, page_tokens = (op.field(i, I64) for i in (4, 6, 10, 11))
    rows = [(first + i) // group for i in range(count)]
    heads = [(first + i) % group for i in range(count)]
    places = [queries.at(rows[i] * query_width + heads[i] * head_dim, 4) for i in range(count)]
    positions = [position + row for row in rows]
    vectors = range(head_dim // LANES)
    greatest = [Variable(f.constant(_LOWEST, F32)) for _ in range(count)]
    sums = [Variable(f.constant(0.0, _FLOATS)) for _ in range(count)]
    outputs = [[Variable(f.constant(0.0, _FLOATS)) for _ in vectors] for _ in range(count)]
    weights = f.local(4 * LANES * count)
    oldest = positions[0] - window + 1
    start = (oldest > 0).where(oldest, f.constant(0, I64)) // LANES * LANES
    with f.loop(start, positions[-1] + 1, LANES) as token:
        page, within = pages.at(token // page_tokens, 8).load(I64), token % page_tokens
        block = keys.at(page + within * head_dim, 2)
        following = f.minimum(token + LANES, positions[-1])
        near = pages.at(following // page_tokens, 8).load(I64) + following % page_tokens * head_dim
        for line in range(0, 2 * LANES * head_dim, 64):
            f.prefetch(keys.at(near, 2).at(line))
            f.prefetch(values.at(near, 2).at(line))
        scores = [[Variable(f.constant(0.0, _FLOATS)) for _ in range(2)] for _ in range(count)]
        with f.loop(0, head_dim, 8) as d:  # several at a time, odd and even ones apart: additions wait for each other
            for step in range(8):
                key = block.at((d + step) * LANES, 2).load(vector(F16)).to(_FLOATS)
                for i in range(count):
                    query = places[i].at(d + step, 4).load(F32).spread()
                    score = scores[i][step % 2]
                    score.set(f.fma(query, key, score.get()))
        lanes = token.to(I32).spread() + f.lanes()
        seen, rises, before = [], f.constant(0, I64), [each.get() for each in greatest]
        for i in range(count):
            now, since = (
                f.maximum(limit, f.constant(-1, I64)).to(I32).spread()
                for limit in (positions[i], positions[i] - window)
            )
            recent = (lanes > since).where(scores[i][0].get() + scores[i][1].get(), _minus_infinity(f))
            seen.append((lanes <= now).where(recent, _minus_infinity(f)))
            greatest[i].set(f.maximum(f.largest(seen[i]), before[i]))
            rises = (greatest[i].get() > before[i]).where(f.constant(1, I64), rises)
        decays = [Variable(f.constant(1.0, _FLOATS)) for _ in range(count)]
        with f.when(rises > 0):  # else all of this is multiplied by 1
            for i in range(count):
                decays[i].set(exp2(f, (before[i] - greatest[i].get()).spread()))
                for output in outputs[i]:
                    output.set(output.get() * decays[i].get())
        for i in range(count):
            weight = exp2(f, seen[i] - greatest[i].get().spread())
            sums[i].set(f.fma(sums[i].get(), decays[i].get(), weight))
            weights.at(4 * LANES * i).store(weight)
        tokens = f.minimum(positions[-1] + 1 - token, LANES)  # past them pages hold anything, NaN too
        with f.loop(0, tokens) as t:
            row = values.at(page + (within + t) * head_dim, 2)
            numbers = [row.at(2 * LANES * j).load(vector(F16)).to(_FLOATS) for j in vectors]
            for i in range(count):
                share = weights.at(4 * LANES * i).at(t, 4).load(F32).spread()
                for output, number in zip(outputs[i], numbers, strict=True):
                    output.set(f.fma(share, number, output.get()))
    for i in range(count):
        place = out.at(rows[i] * out_width + heads[i] * head_dim, 4)
        total = f.total(sums[i].get()).spread()
        for j in vectors:
            place.at(4 * LANES * j).store(outputs[i][j].get() / total)
    f.end()
    return f


def _minus_infinity(f: Function) -> Value:
    return f.constant(float("-inf"), _FLOATS)
