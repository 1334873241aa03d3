"""Weights in groups, and their product with rounded rows: right to the last rounding, and the same bits in any company,
with any number of threads, on every processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_os.drivers.formats.weights import WeightTensor
from llm_os.drivers.native.packed import PackedMatrix

LOSSLESS = ["Q4_0", "Q4_1", "Q4_K", "Q8_0"]
TYPES = [*LOSSLESS, "Q5_0", "Q6_K", "F16", "BF16", "F32"]
COLUMNS = 512  # two blocks of the types that have 256 values in one


def unpacked(matrix: PackedMatrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [rows, groups, 32], d and m [rows, groups], in float64, read as `matrix` draws them."""
    found = []
    for kind, data, blocks in matrix.parts:
        whole = data.reshape(blocks, matrix.groups, -1)
        words = 8 if kind == "Q8" else 4
        codes = whole[..., : 64 * words].reshape(blocks, matrix.groups, words, 16, 4).transpose(0, 3, 1, 2, 4)
        codes = codes.reshape(blocks * 16, matrix.groups, 4 * words)
        if kind != "Q8":
            codes = np.concatenate([codes & 15, codes >> 4], axis=2)
        numbers = whole[..., 64 * words :].view("<f2" if kind == "Q4" else "<f4")
        scales = numbers.reshape(blocks, matrix.groups, -1, 16).transpose(2, 0, 3, 1)
        d, *rest = scales.reshape(len(scales), blocks * 16, matrix.groups).astype(np.float64)
        found.append((codes.astype(np.float64), d, rest[0] if rest else -128 * d))
    codes, d, m = (np.concatenate(each) for each in zip(*found, strict=True))
    return codes, d, m


def values_of(codes: np.ndarray, d: np.ndarray, m: np.ndarray) -> np.ndarray:
    return (codes * d[..., None] + m[..., None]).reshape(len(codes), -1)


def activations(rows: int, columns: int = COLUMNS, seed: int = 1) -> np.ndarray:
    """Normal ones; every fifth row has one value that is far from all others, as models have them."""
    x = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    x[::5, 7] = 40
    return x


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """NaN of any kind are the same."""
    nan = np.isnan(a)
    return np.array_equal(nan, np.isnan(b)) and np.array_equal(a[~nan].view(np.uint32), b[~nan].view(np.uint32))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", [16, 37])
def test_packed_weights_are_those_of_the_file(stored, packed, kind, rows):
    tensor = stored(kind, rows, COLUMNS)
    codes, d, m = unpacked(packed(tensor))
    values, expected = values_of(codes, d, m), tensor.float32().astype(np.float64)
    assert not values[rows:].any()
    if kind in LOSSLESS:
        np.testing.assert_allclose(values[:rows], expected, rtol=0, atol=2e-7 * np.abs(m).max())
    else:
        half_a_step = np.repeat(d[:rows], 32, axis=1) * 0.5001
        assert (np.abs(values[:rows] - expected) <= half_a_step).all()
        greatest = np.abs(expected).reshape(rows, -1, 32).max(-1)
        np.testing.assert_allclose(d[:rows], greatest / 127, rtol=1e-6)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("rows", "batch"), [(16, 1), (37, 5), (100, 70)])
def test_a_product_is_that_of_the_packed_weights_and_the_rounded_rows(
    workbench, stored, packed, way, kind, rows, batch
):
    workbench, tensor = workbench(way), stored(kind, rows, COLUMNS)
    matrix, x = packed(tensor), activations(batch)
    out = workbench.product(matrix, x)
    codes, d, m = unpacked(matrix)
    weights, rounded = values_of(codes, d, m), workbench.rounded(x).values
    sizes = values_of(codes, np.abs(d), np.abs(m))  # of all that is added up, before it cancels out
    limit = 3e-7 * np.abs(rounded) @ sizes.T
    assert (np.abs(out - rounded @ weights.T) <= limit).all()
    exact = x.astype(np.float64) @ tensor.float32().astype(np.float64).T
    error = np.linalg.norm(out[:, :rows] - exact) / np.linalg.norm(exact)
    assert error < 0.02  # of 8 bits for each row, and perhaps for each weight


def test_a_matrix_of_several_types_is_one(workbench, stored, packed):
    tensors = [stored("Q4_1", 48, COLUMNS), stored("Q6_K", 16, COLUMNS), stored("Q4_K", 32, COLUMNS)]
    x = activations(9)
    apart = np.concatenate([workbench().product(packed(tensor), x) for tensor in tensors], axis=1)
    assert same_bits(workbench().product(packed(*tensors), x), apart)


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q8_0"])
def test_a_bias_and_what_was_there_are_added(workbench, stored, packed, kind):
    matrix, x = packed(stored(kind, 48, COLUMNS)), activations(11)
    there, bias = activations(11, 48, 2), activations(1, 48, 3)[0]
    plain = workbench().product(matrix, x)
    assert same_bits(workbench().product(matrix, x, add=there), plain + there)
    np.testing.assert_allclose(workbench().product(matrix, x, bias=bias), plain + bias, rtol=0, atol=1e-4)
    assert same_bits(workbench().product(matrix, x, bias=np.zeros(48, np.float32)), plain)


@pytest.mark.parametrize(
    "row",
    [
        np.zeros(64),
        np.full(64, 3.7),
        np.full(64, -1e38),
        np.linspace(-1e38, 1e38, 64),
        np.linspace(1e-20, 2e-20, 64),
        np.linspace(0, 1e-37, 64),
        np.linspace(-1e-38, 1e-38, 64),
        np.linspace(-1e-41, 1e-41, 64),
        np.arange(64) * 1e-45,
        np.r_[np.zeros(63), 1e-45],
        np.r_[np.zeros(31), 1e30, np.ones(32)],
        np.linspace(100, 101, 64),
    ],
    ids=lambda row: f"{row[0]:.3g}..{row[-1]:.3g}",
)
def test_a_rounded_row_is_within_half_a_step(workbench, way, row):
    x = row.astype(np.float32)[None]
    found = workbench(way).rounded(x)
    groups = x.reshape(-1, 32).astype(np.float64)
    step = (groups.max(1) - groups.min(1)) / 255
    unit = np.spacing(np.abs(groups).max(1).astype(np.float32)).astype(np.float64)
    error = np.abs(found.values.reshape(-1, 32) - groups).max(1)
    tiny = np.where(step < 1e-38, 255 * step, 0)  # too small to be divided by: one step for all
    assert (error <= 0.51 * step + 2 * unit + tiny).all()
    sums = found.terms[0, :, 0].astype(np.float64) * found.codes[0].astype(np.float64).sum(-1)
    np.testing.assert_allclose(found.terms[0, :, 1], sums, rtol=1e-6, atol=1e-44)


def whole_numbers(kind: str, rows: int, columns: int, code: int) -> WeightTensor:
    """Weights that are all `code` as integers, with a scale of 1."""
    one, zero = (np.full((rows, columns // 32, 1), number, "<f2").view(np.uint8) for number in (1, 0))
    if kind == "Q8_0":
        body = np.full((rows, columns // 32, 32), code - 128, np.int8).view(np.uint8)
        data = np.concatenate([one, body], axis=2)
    else:
        body = np.full((rows, columns // 32, 16), code << 4 | code, np.uint8)
        data = np.concatenate([one, zero, body], axis=2)
    return WeightTensor(name="m", shape=(rows, columns), kind=kind, data=data.reshape(rows, -1))


@pytest.mark.parametrize(
    ("kind", "code"), [("Q8_0", 0), ("Q8_0", 1), ("Q8_0", 128), ("Q8_0", 255), ("Q4_1", 0), ("Q4_1", 15)]
)
def test_extreme_integers_are_multiplied_exactly(workbench, packed, way, kind, code):
    """Rows whose every group goes from -128 to 127 in steps of 1: all products are whole numbers."""
    patterns = [
        np.r_[-128, np.full(31, 127)],
        np.r_[np.full(31, -128), 127],
        np.tile([-128, 127], 16),
        np.tile([-128, -128, 127, 127], 8),
        np.r_[-128, 127, np.zeros(30)],
    ]
    x = np.tile(np.array([np.tile(pattern, 3) for pattern in patterns], np.float32), (4, 1))  # 16 at a time, and some
    found = workbench(way).rounded(x)
    assert np.array_equal(found.codes.reshape(x.shape), x)
    assert (found.terms[..., 0] == 1).all() and (found.terms[..., 2] == 0).all()
    out = workbench(way).product(packed(whole_numbers(kind, 16, 96, code)), x)
    weight = code - 128 if kind == "Q8_0" else code
    assert np.array_equal(out, np.repeat(weight * x.sum(1, keepdims=True), 16, axis=1))


SMALL = 96
COMPANY = np.concatenate(
    [
        activations(8, SMALL, 4),
        np.zeros((1, SMALL), np.float32),
        np.full((1, SMALL), 2.5, np.float32),
        1e36 * activations(1, SMALL, 5),
        1e-39 * activations(1, SMALL, 6),
        np.where(np.arange(SMALL) == 40, np.nan, activations(1, SMALL, 7)).astype(np.float32),
        np.where(np.arange(SMALL) == 0, -np.inf, activations(1, SMALL, 8)).astype(np.float32),
    ]
)


@pytest.fixture(params=["Q4_0", "Q4_K", "Q8_0"])
def small(request: Any, stored, packed) -> PackedMatrix:
    """One matrix for each way of holding weights; 256 columns where the type needs them."""
    return packed(stored(request.param, 53, 256 if request.param == "Q4_K" else SMALL))


def test_a_row_is_the_same_bits_alone_and_in_any_company(workbench, small):
    company = np.tile(COMPANY, 3)[:, : (32 * small.groups)]
    alone = np.concatenate([workbench().product(small, row[None]) for row in company])

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, len(company) - 1), min_size=1, max_size=70), st.sampled_from([1, 2, 3]), st.data())
    def check(chosen, threads, data):
        out = workbench().product(small, company[chosen], threads=threads, chunk=data.draw(st.integers(1, 5)))
        assert same_bits(out, alone[chosen])

    check()


def test_every_processor_gives_the_same_bits(workbench, small, way):
    company = np.tile(COMPANY, 3)[:, : (32 * small.groups)]
    for rows in (company, company[:1], np.tile(company, (5, 1))):
        assert same_bits(workbench(way).product(small, rows), workbench().product(small, rows))
        mine, others = workbench(way).rounded(rows[:12]), workbench().rounded(rows[:12])
        assert np.array_equal(mine.codes, others.codes)
        assert np.array_equal(mine.terms, others.terms, equal_nan=True)


def test_many_rows_of_many_columns_are_the_same_bits_as_few(workbench, stored, packed, way):
    """More than are worked on at a time, in every direction, and nowhere a whole number of them."""
    kinds = ["Q4_1", "Q8_0", "Q4_0"]
    columns = 32 * 131
    matrix = packed(*[stored(kind, 16 * n, columns, n) for n, kind in enumerate(kinds, 1)])
    x = activations(300, columns)
    few = np.concatenate([workbench("pairs").product(matrix, x[at : at + 3]) for at in range(0, 300, 3)])
    assert same_bits(workbench(way).product(matrix, x, chunk=2), few)
    assert same_bits(workbench(way).product(matrix, x[:271], threads=3, chunk=1), few[:271])
    there = np.ones_like(few)
    assert same_bits(workbench(way).product(matrix, x, add=there), few + 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_makes_all_of_its_row_so_and_no_other(workbench, small, bad, way):
    x = activations(20, (32 * small.groups), 9)
    expected = workbench(way).product(small, x)
    for place in (0, 33, (32 * small.groups) - 1):
        sick = x.copy()
        sick[13, place] = bad
        out = workbench(way).product(small, sick)
        assert np.isnan(out[13]).all()
        assert same_bits(np.delete(out, 13, 0), np.delete(expected, 13, 0))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1", "Q4_0", "Q4_K"])
def test_a_weight_that_is_not_a_number_is_not_hidden(workbench, stored, packed, kind):
    tensor = stored(kind, 32, COLUMNS)
    data = tensor.data.copy()
    if kind == "F32":
        data.view("<f4")[5, 3] = np.nan
    elif kind == "F16":
        data.view("<f2")[5, 3] = np.inf
    else:
        data[5, :2] = np.array([np.nan], "<f2").view(np.uint8)
    sick = WeightTensor(name="m", shape=tensor.shape, kind=kind, data=data)
    x = activations(3)
    out, expected = workbench().product(packed(sick), x), workbench().product(packed(tensor), x)
    assert np.isnan(out[:, 5]).all()
    assert same_bits(np.delete(out, 5, 1), np.delete(expected, 5, 1))
