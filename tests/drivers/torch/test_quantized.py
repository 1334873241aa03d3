"""Matrices held in 8 and 4 bits: products against plain float32 ones of the same values, and what they hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from llm_os.drivers.formats.quants import HELD, dequantize, held_row_bytes, quantize
from llm_os.drivers.torch.quantized import UNPACKED_BYTES, UnpackedLinear
from llm_os.drivers.torch.rows import rms_norm

SHAPES = [(64, 64), (192, 1536), (128, 2112), (100, 192), (33, 32), (1600, 704)]  # the last: several parts of rows


def matrix(rows, columns):
    values = np.random.default_rng(rows + columns).standard_normal((rows, columns)).astype(np.float32)
    values[:, 3] *= 10
    return values


def inputs(rows, columns):
    numbers = torch.Generator().manual_seed(rows)
    return rms_norm(torch.randn(rows, columns, generator=numbers) ** 3, torch.ones(columns), 1e-5)


def linear(data, kind, columns, dtype=torch.float32):
    return UnpackedLinear(torch.from_numpy(data), kind, columns, 16, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", HELD)
def test_products_are_those_of_the_dequantized_values(kind, shape, dtype):
    data = quantize(matrix(*shape), kind)
    x = inputs(20, shape[1])
    expected = functional.linear(x.double(), torch.from_numpy(dequantize(data, kind, shape[1])).double())
    error = (linear(data, kind, shape[1], dtype)(x).double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("kind", HELD)
def test_weights_are_dequantized_to_the_same_bits_as_everywhere_else(kind):
    data = quantize(matrix(192, 192), kind)
    columns = torch.eye(192)  # a product with one row of it picks a column, exactly
    assert torch.equal(linear(data, kind, 192)(columns).T, torch.from_numpy(dequantize(data, kind, 192)))


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("shape", [(100, 192), (1600, 704)])
def test_a_row_is_the_same_bits_alone_and_in_any_company(kind, shape):
    assert shape[0] == 100 or shape[0] * shape[1] * 4 > UNPACKED_BYTES
    multiply = linear(quantize(matrix(*shape), kind), kind, shape[1])
    x = inputs(37, shape[1])
    together = multiply(x)
    for count in (1, 2, 15, 16, 17):
        assert torch.equal(torch.cat([multiply(x[i : i + count]) for i in range(0, 37, count)]), together)


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8.5), ("Q4_1", 5)])
def test_it_holds_the_bytes_of_its_rows_and_no_more(kind, bits):
    for rows, columns in SHAPES:
        held = linear(quantize(matrix(rows, columns), kind), kind, columns)
        assert held.nbytes == rows * held_row_bytes(kind, columns) == rows * columns * bits / 8


@pytest.mark.parametrize("kind", HELD)
def test_a_damaged_weight_damages_its_column_and_no_other(kind):
    values = matrix(64, 64)
    values[9, 40] = np.nan
    product = linear(quantize(values, kind), kind, 64)(inputs(3, 64))
    assert product[:, 9].isnan().all()
    assert np.isfinite(np.delete(product.numpy(), 9, 1)).all()
