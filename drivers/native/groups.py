"""Weights and activations in groups of 32, and what a product of them is. Knows no operations, no model.

A group is 32 consecutive columns of a row. A weight in it is d * w + m, an activation s * x + o, where w and x are
small integers; d and m are what GGML's Q4_1 and Q8_0 have, s and o fit the group's least and greatest value. So

    out[row] = sum over groups, in order, of   d * s * sum(w * x)  +  m * s * sum(x)  +  o * (d * sum(w) + 32 * m)

has exact sums of integers, and its few floating-point operations always come in the same order: a row gives the same
bits alone and in any batch, with any number of threads, on any processor with the same rounding. (Steps between the
least and the greatest value, rather than around zero, halve the error: groups tend to have an outlier on one side.)

16 rows of a matrix are a block, whose groups lie one after another, ready to be multiplied 16 at a time:

    4 bits   | codes: 4 x 64 bytes, byte b of lane i in vector j: columns 4j+b (low half) and 16+4j+b of row i | d | m |
    8 bits   | codes: 8 x 64 bytes, byte b of lane i in vector j: column 4j+b of row i, plus 128               | d |

d and m are 16 float16 numbers each in "Q4", float32 in "Q4F" and "Q8". Activation rows lie in the same way, 16 rows of
a group together: 16 x 32 codes in one place, 16 x 3 terms in another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from llm_os.drivers.native.machine import F16, F32, I8, I32, LANES, Function, Value, Variable, vector
from llm_os.drivers.native.processor import Processor

GROUP = 32
Kind = Literal["Q4", "Q4F", "Q8"]
GROUP_BYTES: dict[Kind, int] = {"Q4": 256 + 64, "Q4F": 256 + 128, "Q8": 512 + 64}  # of one group of a block
CODES_BYTES = LANES * GROUP  # of a group of 16 activation rows
TERM_BYTES = 12  # of a group of one activation row: s, s * sum(x), o
TERMS_BYTES = LANES * TERM_BYTES
_AHEAD = 16384  # bytes
_FLOATS, _BYTES = vector(F32), vector(I8, 4 * LANES)


class WeightGroup:
    """A group of one block: 16 rows of 32 columns, in registers."""

    def __init__(self, processor: Processor, address: Value, kind: Kind) -> None:
        self._f = f = address.function
        self._processor = processor
        self._codes, self._d, self._m = _read(address, kind)  # codes are from 0 to 255
        for line in range(0, GROUP_BYTES[kind], 64):  # each is read once, and faster than the processor's own guesses
            f.prefetch(address.at(_AHEAD + line))
        ones = f.constant(0x01010101, vector(I32))
        self._sums = f.fma(self._d, self._dot([ones] * len(self._codes)), self._m * float(GROUP))  # d * sum(w) + 32 * m

    def add_to(self, total: Variable, codes: Value, terms: Value) -> None:
        """Add what the group is worth to the 16 totals of an activation row, whose codes and terms lie at these
        addresses."""
        products = self._dot([codes.at(4 * j).load(I32).spread() for j in range(len(self._codes))])
        add_products(total, products, self._d, self._m, self._sums, terms)

    def keep(self, codes: Value, numbers: Value) -> None:
        """Write down the codes, 8 vectors of bytes, and what else `add_products` needs, 3 vectors of floats."""
        for j, code in enumerate(self._codes):
            codes.at(64 * j).store(code)
        for j, number in enumerate((self._d, self._m, self._sums)):
            numbers.at(64 * j).store(number)

    def _dot(self, integers: list[Value]) -> Value:
        nothing = self._f.constant(0, vector(I32))
        return self._processor.dot(self._codes, integers, nothing).to(_FLOATS)


def add_products(total: Variable, products: Value, d: Value, m: Value, sums: Value, terms: Value) -> None:
    """Add what a group is worth to the 16 totals of an activation row, whose terms lie at this address. `products` are
    sum(w * x), `sums` are d * sum(w) + 32 * m."""
    f = products.function
    s, s_sum, o = (terms.at(j, 4).load(F32).spread() for j in range(3))
    total.set(f.fma(sums, o, f.fma(m, s_sum, f.fma(d, products * s, total.get()))))


def finish(totals: list[Variable], out: Value, width: Value, adds: Value) -> None:
    """Write down the totals of consecutive rows, `width` floats apart, added to what is there if `adds` is not 0."""
    places = [out.at(width * i, 4) for i in range(len(totals))]
    with out.function.when(adds > 0):
        for total, place in zip(totals, places, strict=True):
            total.set(total.get() + place.load(_FLOATS))
    for total, place in zip(totals, places, strict=True):
        place.store(total.get())


def _read(part: Value, kind: Kind) -> tuple[list[Value], Value, Value]:
    if kind == "Q8":
        d = part.at(512).load(_FLOATS)
        return [part.at(64 * j).load(_BYTES) for j in range(8)], d, d * -128.0
    pairs = [part.at(64 * j).load(_BYTES) for j in range(4)]
    number = vector(F16) if kind == "Q4" else _FLOATS
    d, m = (part.at(256 + i * (GROUP_BYTES[kind] - 256) // 2).load(number).to(_FLOATS) for i in range(2))
    return [pair & 15 for pair in pairs] + [pair >> 4 for pair in pairs], d, m


def row_at(codes: Value, terms: Value, groups: Value, row: Value) -> tuple[Value, Value]:
    """Where the codes and the terms of an activation row's first group lie. The next ones are CODES_BYTES and
    TERMS_BYTES further."""
    tile, lane = row // LANES * groups, row % LANES
    return codes.at(tile, CODES_BYTES).at(lane, GROUP), terms.at(tile, TERMS_BYTES).at(lane, TERM_BYTES)


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
        codes.at(group, CODES_BYTES).store(whole[0].to(vector(I8)))
        codes.at(group, CODES_BYTES).at(LANES).store(whole[1].to(vector(I8)))
        total = f.total(whole[0] + whole[1]).to(F32)
        for i, term in enumerate((s, s * total, f.fma(s, f.constant(128.0, F32), least))):
            terms.at(group, TERMS_BYTES).at(i, 4).store(term)
    with f.when(f.total(unsound.get()).differs(0.0)), f.loop(0, groups) as group:
        for i in range(3):
            terms.at(group, TERMS_BYTES).at(i, 4).store(f.constant(float("nan"), F32))
