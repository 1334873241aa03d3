"""Matrices held in 8 and 4 bits: every way to multiply, against plain float32 products of the same values."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

from llm_os.drivers.formats.quants import dequantize, quantize
from llm_os.drivers.torch import quantized
from llm_os.drivers.torch.quantized import Int4Linear, IntegerLinear, UnpackedLinear, choose_way, held_bytes
from llm_os.drivers.torch.rows import rms_norm

SHAPES = [(64, 64), (192, 1536), (128, 2112)]  # the last two: sums above 2**24, and several parts of columns
KINDS = ["INT8_ROW", "INT8_ROW_H64", "Q4_1"]
vnni = pytest.mark.skipif(quantized.probe_integers() != "onednn", reason="no integer instructions on this processor")
int4 = pytest.mark.skipif(not quantized.probe_int4(), reason="no product with 4-bit weights here")


def matrix(rows, columns):
    values = np.random.default_rng(rows + columns).standard_normal((rows, columns)).astype(np.float32)
    values[:, 3] *= 10
    return values


def parts(data):
    """As loading gives a large matrix: in several parts."""
    return torch.from_numpy(data).split(64)


def inputs(rows, columns):
    numbers = torch.Generator().manual_seed(rows)
    return rms_norm(torch.randn(rows, columns, generator=numbers) ** 3, torch.ones(columns), 1e-5)


def expected(data, kind, x):
    return functional.linear(x.double(), torch.from_numpy(dequantize(data, kind, x.shape[1])).double())


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@vnni
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["INT8_ROW", "INT8_ROW_H64"])
def test_emulated_integers_give_the_bits_of_the_processors(shape, kind):
    data = quantize(matrix(*shape), kind)
    x = inputs(37, shape[1])
    data[: shape[0] // 2, 4:] |= 64  # large weights of few signs, so that sums are large, too
    data[: shape[0] // 2, 4:] &= 127
    x[5] = 0
    x[6] = 1e30 * torch.sign(x[6])  # every activation at its limit
    onednn, emulated = (IntegerLinear(parts(data), kind, way) for way in ("onednn", "emulated"))
    x[8:20] = x[8:20].abs()
    answer = emulated(x)
    assert not answer[5].any()
    for count in (1, 2, 16, 37):
        assert torch.equal(torch.cat([onednn(x[i : i + count]) for i in range(0, 37, count)]), answer)


def test_the_largest_integers_do_not_overflow():
    data = quantize(np.ones((64, 2048), np.float32), "INT8_ROW")
    x = torch.ones(3, 2048)
    for way in {"emulated", quantized.probe_integers()}:
        assert torch.equal(IntegerLinear(parts(data), "INT8_ROW", way)(x), torch.full((3, 64), 2048.0))
        assert torch.equal(IntegerLinear(parts(data), "INT8_ROW", way)(-x), torch.full((3, 64), -2048.0))


@pytest.mark.parametrize("shape", [*SHAPES, (100, 192), (33, 64)])
def test_integer_products_differ_from_float_ones_only_by_the_rounding_of_activations(shape):
    x = inputs(20, shape[1])
    errors = {}
    for kind in ("INT8_ROW", "INT8_ROW_H64"):
        data = quantize(matrix(*shape), kind)
        errors[kind] = error(IntegerLinear(parts(data), kind, "emulated")(x), expected(data, kind, x))
    assert errors["INT8_ROW"] < 0.1
    assert errors["INT8_ROW_H64"] < 0.02  # without outliers 8 bits are finer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (100, 192), (33, 64), (1600, 704)])  # the last: several parts of rows
@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_products_are_those_of_the_dequantized_values(kind, shape, dtype):
    data = quantize(matrix(*shape), kind)
    x = inputs(20, shape[1])
    linear = UnpackedLinear(torch.from_numpy(data), kind, shape[1], 16, dtype)
    assert error(linear(x), expected(data, kind, x)) < (1e-6 if dtype == torch.float32 else 0.01)


@int4
@pytest.mark.parametrize("shape", [(64, 64), (192, 1536), (1600, 704)])
def test_int4_products_are_near_those_of_the_dequantized_values(shape):
    data = quantize(matrix(*shape), "Q4_1")
    x = inputs(20, shape[1])
    linear = Int4Linear(parts(data), shape[1])
    assert error(linear(x), expected(data, "Q4_1", x)) < 0.01


@pytest.mark.parametrize(("kind", "integers", "four"), [*product(KINDS, [None, "emulated", "onednn"], [False, True])])
def test_every_way_holds_the_bytes_that_it_says(kind, integers, four):
    if (integers == "onednn" and quantized.probe_integers() != "onednn") or (four and not quantized.probe_int4()):
        pytest.skip("not on this processor")
    for rows, columns in ((64, 64), (100, 192), (320, 704)):
        data = quantize(matrix(rows, columns), kind)
        way = choose_way(kind, rows, columns, integers, four)
        if way == "int4":
            linear = Int4Linear(parts(data), columns)
        elif way == "unpacked":
            linear = UnpackedLinear(torch.from_numpy(data), kind, columns, 16, torch.float32)
        else:
            linear = IntegerLinear(parts(data), kind, way)
        assert linear.nbytes == held_bytes(way, kind, rows, columns)
        assert linear.nbytes < 0.3 * rows * columns * 4


def test_a_processor_whose_integer_products_overflow_is_not_used(monkeypatch):
    """As oneDNN without VNNI: pairs of products are added in 16 bits."""

    def multiply(self, codes):
        pairs = (codes.float()[:, None] * weight).unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767)
        return pairs.sum(-1) - 128 * weight.sum(-1)

    weight = torch.full((64, 1088), 127.0)
    weight[::2] = torch.arange(1088, dtype=torch.uint8).view(torch.int8)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(quantized._PackedIntegers, "__call__", multiply)
    assert quantized.probe_integers.__wrapped__() == "emulated"


def test_without_vnni_integers_are_emulated_and_without_avx2_int4_is_unpacked(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    assert quantized.probe_integers.__wrapped__() == "emulated"
    assert quantized.probe_int4.__wrapped__() is False


def test_a_product_with_4_bits_that_sees_other_rows_is_not_used(monkeypatch):
    honest = Int4Linear.__call__
    monkeypatch.setattr(Int4Linear, "__call__", lambda self, x: honest(self, x) * (1 + len(x) % 2))
    assert quantized.probe_int4.__wrapped__() is False
