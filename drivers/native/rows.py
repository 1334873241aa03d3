"""Operations on the rows between two products: norms, activations, rotation. One item of work is one row. Knows no
model.

Each ends in what the next product takes: integers in groups, with their scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir

from llm_os.drivers.native.groups import GROUP, row_at, write_quantized
from llm_os.drivers.native.machine import F16, F32, I16, I32, I64, LANES, PTR, Function, Value, Variable, vector

_FLOATS = vector(F32)
_LOG2_E = math.log2(math.e)
_LARGEST_HALF = 65504.0


def exp2(f: Function, x: Value) -> Value:
    """2**x of each lane, to 1e-7 of it; 0 below -126, at most 2**127. NaN stays."""
    limited = (x < -126.0).where(f.constant(-126.0, _FLOATS), (x > 127.0).where(f.constant(127.0, _FLOATS), x))
    whole = f.rounded(limited)
    part = limited - whole
    power = f.constant(_TAYLOR[-1], _FLOATS)
    for coefficient in reversed(_TAYLOR[:-1]):
        power = f.fma(power, part, f.constant(coefficient, _FLOATS))
    exponent = ((whole.to(vector(I32)) + 127) << 23).bits(_FLOATS)
    return (x < -126.0).where(f.constant(0.0, _FLOATS), power * exponent)


_TAYLOR = [math.log(2) ** k / math.factorial(k) for k in range(8)]


def _silu(f: Function, x: Value) -> Value:
    """x * sigmoid(x) (Elfwing et al. 2017)."""
    return x / (1.0 + exp2(f, x * -_LOG2_E))


def _gelu_tanh(f: Function, x: Value) -> Value:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016): x * sigmoid(2u)."""
    u = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
    return x / (1.0 + exp2(f, u * (-2 * _LOG2_E)))


ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}


def _sum_of_squares(f: Function, address: Value, count: Value) -> Value:
    """Of `count` floats, in a fixed order."""
    squares = Variable(f.constant(0.0, _FLOATS))
    with f.loop(0, count, LANES) as i:
        x = address.at(i, 4).load(_FLOATS)
        squares.set(f.fma(x, x, squares.get()))
    return f.total(squares.get())


def _scale(f: Function, address: Value, count: Value, eps: Value) -> Value:
    """1 / the root of the mean square plus eps, in every lane."""
    mean = _sum_of_squares(f, address, count) / count.to(F32)
    return (1.0 / f.root(mean + eps)).spread()


def write_norm(module: ir.Module) -> Function:
    """RMSNorm (Zhang and Sennrich 2019) of a row, as integers.

    Fields: codes, terms, rows, norm weight, groups, epsilon (float32 bits)."""
    f = Function(module, "norm", [PTR, I64, PTR])
    op, item, _ = f.arguments
    groups = op.field(7, I64)
    row = op.field(5, PTR).at(item * groups, 4 * GROUP)
    weight = op.field(6, PTR)
    scale = _scale(f, row, groups * GROUP, op.at(8, 8).load(F32))

    def pair(group: Value) -> tuple[Value, Value]:
        low, high = (
            row.at(group * GROUP + i, 4).load(_FLOATS) * scale * weight.at(group * GROUP + i, 4).load(_FLOATS)
            for i in (0, LANES)
        )
        return low, high

    _quantized(f, op, item, groups, pair)
    return f


def write_rounding(module: ir.Module) -> Function:
    """A row as integers. Fields: codes, terms, rows, -, groups."""
    f = Function(module, "rounding", [PTR, I64, PTR])
    op, item, _ = f.arguments
    groups = op.field(7, I64)
    row = op.field(5, PTR).at(item * groups, 4 * GROUP)

    def pair(group: Value) -> tuple[Value, Value]:
        return row.at(group, 4 * GROUP).load(_FLOATS), row.at(group * GROUP + LANES, 4).load(_FLOATS)

    _quantized(f, op, item, groups, pair)
    return f


def write_gate(module: ir.Module, activation: str) -> Function:
    """activation(gate) * up of a row [gate | up], as integers. Fields: codes, terms, rows, -,
    groups of each half."""
    f = Function(module, activation, [PTR, I64, PTR])
    op, item, _ = f.arguments
    groups = op.field(7, I64)
    gate = op.field(5, PTR).at(item * groups, 8 * GROUP)
    up = gate.at(groups, 4 * GROUP)
    activate = ACTIVATIONS[activation]

    def pair(group: Value) -> tuple[Value, Value]:
        places = [group * GROUP + i for i in (0, LANES)]
        low, high = (activate(f, gate.at(i, 4).load(_FLOATS)) * up.at(i, 4).load(_FLOATS) for i in places)
        return low, high

    _quantized(f, op, item, groups, pair)
    return f


def write_norm_added(module: ir.Module) -> Function:
    """Add the RMSNorm of a row to another. Fields: target rows, -, rows, norm weight, groups, epsilon."""
    f = Function(module, "norm_added", [PTR, I64, PTR])
    op, item, _ = f.arguments
    groups = op.field(7, I64)
    target = op.field(3, PTR).at(item * groups, 4 * GROUP)
    row = op.field(5, PTR).at(item * groups, 4 * GROUP)
    weight = op.field(6, PTR)
    scale = _scale(f, row, groups * GROUP, op.at(8, 8).load(F32))
    with f.loop(0, groups * GROUP, LANES) as i:
        normed = row.at(i, 4).load(_FLOATS) * scale * weight.at(i, 4).load(_FLOATS)
        place = target.at(i, 4)
        place.store(place.load(_FLOATS) + normed)
    f.end()
    return f


def write_gather(module: ir.Module) -> Function:
    """Some rows of all, one after another. Fields: target rows, -, rows, -, groups. State: 6 the rows' numbers."""
    f = Function(module, "gather", [PTR, I64, PTR])
    op, item, state = f.arguments
    groups = op.field(7, I64)
    target = op.field(3, PTR).at(item * groups, 4 * GROUP)
    row = op.field(5, PTR).at(state.field(6, PTR).at(item, 8).load(I64) * groups, 4 * GROUP)
    with f.loop(0, groups * GROUP, LANES) as i:
        target.at(i, 4).store(row.at(i, 4).load(_FLOATS))
    f.end()
    return f


def write_best(module: ir.Module) -> Function:
    """The greatest of a row, the first of equals, and whether all are finite. Fields: best (two 64-bit numbers for each
    row), -, rows, -, floats of a row, how many count."""
    f = Function(module, "best", [PTR, I64, PTR])
    op, item, _ = f.arguments
    row, count = op.field(5, PTR).at(item * op.field(7, I64), 4), op.field(8, I64)
    lowest = f.constant(float("-inf"), _FLOATS)
    greatest, places = Variable(lowest), Variable(f.constant(0, vector(I32)))
    unsound = Variable(f.constant(0.0, _FLOATS))
    with f.loop(0, count, LANES) as i:
        place = i.to(I32).spread() + f.lanes()
        counts = place < count.to(I32).spread()
        x = row.at(i, 4).load(_FLOATS)
        unsound.set(unsound.get() + counts.where(x - x, f.constant(0.0, _FLOATS)))
        more = counts.where(x, lowest) > greatest.get()
        greatest.set(more.where(x, greatest.get()))
        places.set(more.where(place, places.get()))
    best = f.largest(greatest.get()).spread()
    none = f.constant(2**31 - 1, vector(I32))
    first = f.least((greatest.get() >= best).where(places.get(), none))
    out = op.field(3, PTR).at(item, 16)
    out.store(first.to(I64))
    sound = f.total(unsound.get()).equals(0.0)
    out.at(8).store(sound.where(f.constant(1, I64), f.constant(0, I64)))
    f.end()
    return f


def _quantized(
    f: Function, op: Value, item: Value, groups: Value, pair: Callable[[Value], tuple[Value, Value]]
) -> None:
    write_quantized(f, groups, pair, *row_at(op.field(3, PTR), op.field(4, PTR), groups, item))
    f.end()


def write_rotation(module: ir.Module, head_dim: int, rope_dim: int, qk_norm: bool) -> Function:
    """Rotary position embedding (Su et al. 2021) of a row [queries | keys | values]; keys and values go to their
    page as float16, keys in blocks of 16 tokens with a token for each lane.

    Fields: rows, query heads, key heads, floats of a row, cosines and sines (`rope_dim` floats for each row), scale of
    the queries (float32 bits), address of the layer's keys, of its values, bytes from one head to the next, norm
    weights of queries and keys, epsilon.
    State: 2 where each row's page begins, in numbers from the start; 3 which token of it.
    """
    f = Function(module, f"rotation_{head_dim}_{rope_dim}{'_norm' if qk_norm else ''}", [PTR, I64, PTR])
    op, item, state = f.arguments
    heads, kv_heads, width = (op.field(i, I64) for i in (4, 5, 6))
    row = op.field(3, PTR).at(item * width, 4)
    angles = op.field(7, PTR).at(item, 4 * rope_dim)
    query_scale = op.at(8, 8).load(F32).spread()
    page = state.field(2, PTR).at(item, 8).load(I64)
    token = state.field(3, PTR).at(item, 8).load(I64)
    keys, values = (op.field(i, PTR).at(page, 2) for i in (9, 10))
    head_bytes = op.field(11, I64)
    half = rope_dim // 2
    key_block = keys.at(token // LANES, 2 * LANES * head_dim).at(token % LANES, 2)
    value_row = values.at(token, 2 * head_dim)
    with f.loop(0, heads + kv_heads) as head:
        place = row.at(head, 4 * head_dim)
        if qk_norm:
            scale = _scale(f, place, f.constant(head_dim, I64), op.at(13, 8).load(F32))
            weight = op.field(12, PTR).at((head < heads).where(f.constant(0, I64), f.constant(head_dim, I64)), 4)
            for i in range(0, head_dim, LANES):
                place.at(i, 4).store(place.at(i, 4).load(_FLOATS) * scale * weight.at(i, 4).load(_FLOATS))
        for i in range(0, half, LANES):
            first, second = place.at(i, 4).load(_FLOATS), place.at(half + i, 4).load(_FLOATS)
            cos, sin = angles.at(i, 4).load(_FLOATS), angles.at(half + i, 4).load(_FLOATS)
            place.at(i, 4).store(first * cos - second * sin)
            place.at(half + i, 4).store(second * cos + first * sin)
        with f.when(head < heads):
            for i in range(0, head_dim, LANES):
                place.at(i, 4).store(place.at(i, 4).load(_FLOATS) * query_scale)
        with f.when(head >= heads):
            block = key_block.at((head - heads) * head_bytes)
            for i in range(0, head_dim, LANES):
                numbers = _in_range(f, place.at(i, 4).load(_FLOATS)).to(vector(F16)).bits(vector(I16))
                for lane in range(LANES):
                    block.at(2 * LANES * (i + lane)).store(numbers.lane(lane))
    with f.loop(0, kv_heads) as head:
        place = row.at((heads + kv_heads + head) * head_dim, 4)
        target = value_row.at(head * head_bytes)
        for i in range(0, head_dim, LANES):
            target.at(2 * i).store(_in_range(f, place.at(i, 4).load(_FLOATS)).to(vector(F16)))
    f.end()
    return f


def _in_range(f: Function, x: Value) -> Value:
    """Infinity would make NaN of the zero weight that a masked token has. NaN stays NaN."""
    limit = f.constant(_LARGEST_HALF, _FLOATS)
    return (x > limit).where(limit, (x < -_LARGEST_HALF).where(f.constant(-_LARGEST_HALF, _FLOATS), x))
