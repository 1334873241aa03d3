"""Norms, activations and rotation against float64, and what they leave of what is not a number."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llvmlite import ir

from llm_os.drivers.native.machine import F32, I64, LANES, PTR, Function, vector
from llm_os.drivers.native.processor import Processor
from llm_os.drivers.native.rows import ACTIVATIONS, exp2

EPS = 1e-5
WIDTH = 160


def bits(number: float) -> int:
    return int.from_bytes(struct.pack("<f", number), "little")


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def apply() -> Callable[[str, np.ndarray], np.ndarray]:
    """apply("exp2", x), or the name of an activation: of each number of a multiple of 16."""
    module, processor = ir.Module("elements"), Processor()
    functions = {"exp2": exp2, **ACTIVATIONS}
    for name, of in functions.items():
        f = Function(module, name, [PTR, PTR, I64], inner=False)
        source, target, count = f.arguments
        with f.loop(0, count, LANES) as i:
            target.at(i, 4).store(of(f, source.at(i, 4).load(vector(F32))))
        f.end()
    code = processor.link(processor.compile(module))

    def call(name: str, x: np.ndarray) -> np.ndarray:
        x, out = np.ascontiguousarray(x, np.float32), np.empty(len(x), np.float32)
        function = code.function(name, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        function(address(x), address(out), len(x))
        return out

    return call


def test_powers_of_two_are_right_to_a_ten_millionth(apply):
    x = np.r_[np.linspace(-126, 127, 99_984), np.arange(-8, 8)].astype(np.float32)
    expected = np.exp2(x.astype(np.float64))
    assert np.abs(apply("exp2", x) / expected - 1).max() < 1.5e-7
    whole = np.arange(-126, 2).astype(np.float32)
    assert np.array_equal(apply("exp2", whole), np.exp2(whole))


def test_powers_of_two_end_well(apply):
    x = np.array([-np.inf, -3e38, -127, -126.0001, -126, 127, 128, 3e38, np.inf, np.nan, 0, -0.0, 1e-45, 0, 0, 0], "f4")
    least, most = 2.0**-126, 2.0**127
    expected = [0, 0, 0, 0, least, most, most, most, most, np.nan, 1, 1, 1, 1, 1, 1]
    assert np.array_equal(apply("exp2", x), np.array(expected, "f4"), equal_nan=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


REFERENCES = {"silu": silu, "gelu_tanh": gelu_tanh}


@pytest.mark.parametrize("name", REFERENCES)
def test_activations_are_right_to_a_millionth(apply, name):
    assert REFERENCES.keys() == ACTIVATIONS.keys()
    x = np.r_[np.linspace(-80, 80, 50_000), np.linspace(-1, 1, 1024), np.geomspace(1e-30, 1e4, 16 * 5)].astype("f4")
    with np.errstate(over="ignore"):
        expected = REFERENCES[name](x.astype(np.float64))
    found = apply(name, x)
    near = np.abs(x) < 4
    assert np.abs(found - expected)[near].max() < 1e-6
    assert (np.abs(found - expected) <= 2e-6 * np.abs(x)).all()
    big = np.array([3e38, 1e20, -1e20, -3e38] * 4, "f4")
    np.testing.assert_allclose(apply(name, big), np.maximum(big, 0), rtol=1e-6, atol=3)
    assert np.isnan(apply(name, np.array([np.nan] * 16))).all()


def check_rounded(integers: Any, expected: np.ndarray) -> None:
    """That they stand for these rows, to half a step of a group's 255."""
    found = integers.values.reshape(len(expected), -1, 32)
    groups = expected.reshape(found.shape)
    step = (groups.max(-1) - groups.min(-1))[..., None] / 255
    assert (np.abs(found - groups) <= 0.501 * step + 1e-6 * np.abs(groups).max(-1, keepdims=True)).all()
    np.testing.assert_allclose(integers.terms[..., 0], step[..., 0], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e4])
def test_a_norm_is_that_of_float64_in_integers(workbench, integers, way, scale):
    workbench = workbench(way)
    x, weight = scale * normal(7, WIDTH), 1 + normal(WIDTH, seed=1)
    x[3, 40] = 300 * scale
    found = integers(7, WIDTH // 32)
    workbench.run(["norm", 1, 1, *found.places, *map(address, (x, weight)), WIDTH // 32, bits(EPS)], rows=7)
    x64 = x.astype(np.float64)
    check_rounded(found, x64 / np.sqrt((x64**2).mean(1, keepdims=True) + EPS) * weight)


def test_a_norm_is_added_to_other_rows(workbench, way):
    x, target, weight = normal(5, WIDTH), normal(5, WIDTH, seed=2), 1 + normal(WIDTH, seed=1)
    x64 = x.astype(np.float64)
    expected = target + x64 / np.sqrt((x64**2).mean(1, keepdims=True) + EPS) * weight
    workbench(way).run(
        ["norm_added", 1, 1, address(target), 0, address(x), address(weight), WIDTH // 32, bits(EPS)], rows=5
    )
    np.testing.assert_allclose(target, expected, rtol=1e-6, atol=2e-6)


def test_a_row_of_zeros_stays_so_in_a_norm(workbench, integers):
    x, weight = np.zeros((1, 64), np.float32), normal(64)
    found = integers(1, 2)
    workbench().run(["norm", 1, 1, *found.places, *map(address, (x, weight)), 2, bits(EPS)])
    assert not found.terms.any()


@pytest.mark.parametrize("activation", REFERENCES)
def test_a_gate_is_that_of_float64_in_integers(workbench, integers, activation):
    x = 2 * normal(6, 2 * WIDTH)
    found = integers(6, WIDTH // 32)
    workbench(activation=activation).run(["gate", 1, 1, *found.places, address(x), 0, WIDTH // 32], rows=6)
    gate, up = x.astype(np.float64)[:, :WIDTH], x.astype(np.float64)[:, WIDTH:]
    check_rounded(found, REFERENCES[activation](gate) * up)


@pytest.mark.parametrize("operation", ["norm", "gate", "rounding"])
def test_what_is_not_a_number_stays_in_its_row(workbench, integers, operation):
    x = normal(4, 128)
    x[2, 5] = np.nan
    groups = 2 if operation == "gate" else 4
    found = integers(4, groups)
    weight = np.ones(128, np.float32)
    workbench().run([operation, 1, 1, *found.places, *map(address, (x, weight)), groups, bits(EPS)], rows=4)
    assert np.isnan(found.terms[2]).all()
    assert np.isfinite(np.delete(found.terms, 2, 0)).all()


class Rotated:
    """Rows [queries | keys | values] that a rotation has gone over, and the pages it wrote."""

    def __init__(self, workbench, x: np.ndarray, angles: np.ndarray, heads: int, kv_heads: int, dim: int, norms=None):
        self.rows, self.heads, self.kv_heads, self.dim = x.copy(), heads, kv_heads, dim
        self.page_tokens = 32
        self.pages = np.full((len(x), 2, kv_heads, 32 * dim), np.nan, np.float16)
        chance = np.random.default_rng(5)
        self.page, self.token = chance.permutation(len(x)), chance.integers(0, 32, len(x))
        begins = self.page * self.pages[0].size
        head_bytes = 32 * dim * 2
        values = address(self.pages) + kv_heads * head_bytes
        width, rope_dim = x.shape[1], angles.shape[1]
        norm = np.zeros(2 * dim, np.float32) if norms is None else norms
        places = [address(self.rows), heads, kv_heads, width, address(angles), bits(0.25)]
        caches = [address(self.pages), values, head_bytes, address(norm), bits(EPS)]
        state = (0, address(begins), address(self.token))
        workbench.run([f"rotation_{rope_dim}", 1, 1, *places, *caches], rows=len(x), state=state)

    def queries(self) -> np.ndarray:
        return self.rows[:, : self.heads * self.dim].reshape(len(self.rows), self.heads, self.dim)

    def keys(self) -> np.ndarray:
        blocks = self.pages[self.page, 0].reshape(-1, self.kv_heads, 2, self.dim, 16)
        return blocks[range(len(self.rows)), :, self.token // 16, :, self.token % 16]

    def values(self) -> np.ndarray:
        return self.pages[self.page, 1].reshape(-1, self.kv_heads, 32, self.dim)[range(len(self.rows)), :, self.token]


@pytest.mark.parametrize(("dim", "rope_dim"), [(64, 64), (96, 32), (96, 96), (80, 64), (128, 128), (256, 64)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rotation_is_that_of_float64_and_fills_the_pages(workbench, dim, rope_dim, qk_norm):
    heads, kv_heads, rows = 6, 2, 9
    x = normal(rows, (heads + 2 * kv_heads) * dim)
    turn = np.random.default_rng(3).uniform(-10, 10, (rows, rope_dim // 2))
    angles = np.concatenate([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)
    norms = 1 + normal(2 * dim, seed=4)
    compiled = workbench(head_dim=dim, rope_dims=(rope_dim,), qk_norm=qk_norm)
    found = Rotated(compiled, x, angles, heads, kv_heads, dim, norms)

    split = x.astype(np.float64).reshape(rows, -1, dim)
    qk, values = split[:, : heads + kv_heads], split[:, heads + kv_heads :]
    if qk_norm:
        weight = np.repeat(norms.reshape(2, dim), [heads, kv_heads], axis=0)
        qk = qk / np.sqrt((qk**2).mean(-1, keepdims=True) + EPS) * weight
    half = rope_dim // 2
    first, second, rest = qk[..., :half], qk[..., half:rope_dim], qk[..., rope_dim:]
    cos, sin = np.cos(turn)[:, None], np.sin(turn)[:, None]
    qk = np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    np.testing.assert_allclose(found.queries(), 0.25 * qk[:, :heads], rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.keys(), qk[:, heads:], rtol=6e-4, atol=3e-6)
    assert np.array_equal(found.values(), values.astype(np.float16))
    written = np.isfinite(found.pages).sum()
    assert written == rows * 2 * kv_heads * dim  # nobody else's tokens


def test_keys_and_values_past_the_range_of_float16_stay_finite(workbench):
    x = 1e6 * normal(3, 5 * 64)
    angles = np.tile(np.repeat([1, 0], 32).astype(np.float32), (3, 1))
    found = Rotated(workbench(), x, angles, 3, 1, 64)
    expected = np.clip(x.reshape(3, 5, 64)[:, 3:], -65504, 65504).astype(np.float16)
    assert np.array_equal(found.keys()[:, 0], expected[:, 0])
    assert np.array_equal(found.values()[:, 0], expected[:, 1])


def test_a_row_is_rotated_as_if_it_were_alone(workbench, way):
    x, turn = normal(17, 5 * 64), np.random.default_rng(3).uniform(-10, 10, (17, 32))
    angles = np.concatenate([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)
    together = Rotated(workbench(way), x, angles, 3, 1, 64)
    for i in range(17):
        alone = Rotated(workbench(), x[i : i + 1], angles[i : i + 1].copy(), 3, 1, 64)
        assert np.array_equal(alone.rows[0], together.rows[i])
        assert np.array_equal(alone.keys()[0], together.keys()[i])
        assert np.array_equal(alone.values()[0], together.values()[i])


@pytest.mark.parametrize("count", [1, 15, 16, 203])
def test_the_greatest_of_a_row_is_the_first_of_equals_and_padding_is_none(workbench, count):
    width = -(-count // 16) * 16
    x = np.full((12, width), 9e9, np.float32)  # past what counts there is anything
    x[:, :count] = np.round(normal(12, count))  # many are equal
    x[1, :count] = -np.inf
    x[2, count // 2] = np.nan
    x[3, count - 1] = np.inf
    x[4, :count] = -5
    x[5:, count:] = np.nan
    best = np.full((12, 2), -1, np.int64)
    workbench().run(["best", 1, 1, address(best), 0, address(x), 0, width, count], rows=12)
    sound = np.isfinite(x[:, :count]).all(1)
    assert np.array_equal(best[:, 1], sound)
    assert np.array_equal(best[sound, 0], x[sound, :count].argmax(1))
    assert ((best[:, 0] >= 0) & (best[:, 0] < count)).all()
