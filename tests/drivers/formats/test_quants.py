"""Dequantizing agrees with gguf-py, bit for bit, through libgguf and through numpy."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from llm_os.drivers.formats import quants, weights
from llm_os.kernel.errors import Unsupported

QUANTIZED = [name for name, kind in quants.KINDS.items() if kind.block_values > 1]
EXTREME_HALVES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00)  # 0, tiny, huge, inf, nan


def random_rows(kind: str, rows: int, blocks: int) -> np.ndarray:
    """Random bytes, where every fourth row has an extreme float16 wherever the type keeps its scales."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    size = quants.KINDS[kind].block_bytes
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2)):
        extreme = rng.choice(np.array(EXTREME_HALVES, dtype="<u2"), (rows, blocks, 1)).view(np.uint8)
        data[::4, :, at : at + 2] = extreme[::4]
    return data.reshape(rows, blocks * size)


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal as bit patterns; a NaN equals any NaN, since its payload is the compiler's choice."""
    nan = np.isnan(expected)
    if not np.array_equal(np.isnan(found), nan):
        return False
    return np.array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.fixture(params=["libgguf", "numpy"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(quants, "libgguf", None)
    else:
        pytest.importorskip("libgguf")
    return str(request.param)


@pytest.mark.parametrize("kind", list(quants.KINDS))
def test_values_are_those_of_gguf_py(backend: str, kind: str) -> None:
    data = random_rows(kind, 37, 3) if kind in QUANTIZED else random_rows("Q8_0", 64, 8)
    columns = data.shape[1] // quants.KINDS[kind].block_bytes * quants.KINDS[kind].block_values
    found = quants.dequantize(data, kind, columns)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert found.shape == (data.shape[0], columns)
    assert found.dtype == np.float32
    assert same_bits(found, np.ascontiguousarray(expected))


def test_the_numpy_fallback_is_the_same_across_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_rows("Q4_K", 10, 2)
    whole = quants.dequantize_blocks(data, "Q4_K", 512)
    monkeypatch.setattr(quants, "_CHUNK_VALUES", 3 * 512)
    assert same_bits(quants.dequantize_blocks(data, "Q4_K", 512), whole)


def test_rows_may_be_a_strided_read_only_view(backend: str) -> None:
    data = random_rows("Q5_1", 8, 2)
    data.flags.writeable = False
    assert same_bits(quants.dequantize(data[::2], "Q5_1", 64), quants.dequantize(data, "Q5_1", 64)[::2])


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_the_result_is_fresh_and_writable(backend: str, kind: str) -> None:
    data = np.zeros((2, quants.KINDS[kind].row_bytes(64)), np.uint8)
    values = quants.dequantize(data, kind, 64)
    values += 1
    assert not data.any()


def test_no_rows_give_no_values(backend: str) -> None:
    assert quants.dequantize(np.zeros((0, 18), np.uint8), "Q4_0", 32).shape == (0, 32)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_block_sizes_are_those_of_gguf_py(kind: str) -> None:
    found = quants.KINDS[kind]
    assert (found.block_values, found.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(found.number)]


def test_rows_of_the_wrong_length_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="does not hold rows of 64 values"):
        quants.dequantize(np.zeros((2, 18), np.uint8), "Q4_0", 64)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(Unsupported, match="IQ2_XS"):
        quants.dequantize(np.zeros((1, 1), np.uint8), "IQ2_XS", 1)


@pytest.fixture
def rows() -> np.ndarray:
    numbers = np.random.default_rng(3)
    values = numbers.standard_normal((50, 192)).astype(np.float32)
    values[:, 7] *= 30  # an outlier in every row
    values[4] = 0
    values[5] = 2.5
    return values


@pytest.mark.parametrize(("kind", "limit"), [("Q8_0", 0.015), ("Q4_1", 0.13)])
def test_quantized_values_are_near_the_originals(rows: np.ndarray, kind: str, limit: float) -> None:
    data = quants.quantize(rows, kind)
    assert data.shape == (50, quants.held_row_bytes(kind, 192))
    values = quants.dequantize(data, kind, 192)
    assert np.linalg.norm(values - rows) < limit * np.linalg.norm(rows)
    assert not values[4].any()
    assert np.allclose(values[5], 2.5, rtol=0.01)


def test_quantizing_what_was_quantized_changes_nothing(rows: np.ndarray) -> None:
    for kind in quants.HELD:
        once = quants.dequantize(quants.quantize(rows, kind), kind, 192)
        twice = quants.dequantize(quants.quantize(once, kind), kind, 192)
        assert np.allclose(once, twice, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", quants.HELD)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damaged_values_stay_damaged_where_they_are(rows: np.ndarray, kind: str, bad: float) -> None:
    expected = quants.dequantize(quants.quantize(rows, kind), kind, 192)
    rows[9, 3] = bad
    values = quants.dequantize(quants.quantize(rows, kind), kind, 192)
    assert np.isnan(values[9, :32]).all()
    assert np.array_equal(values[9, 32:], expected[9, 32:])
    assert np.array_equal(np.delete(values, 9, 0), np.delete(expected, 9, 0))


@pytest.mark.parametrize("exponent", [-30, -8, -7, -6, -5, -4, -2, 0, 2, 4])
def test_eight_bits_are_off_by_half_a_step_at_most(rows: np.ndarray, exponent: int) -> None:
    values = rows * np.float32(10.0**exponent)
    data = quants.quantize(values, "Q8_0")
    steps = data.reshape(-1, 34)[:, :2].copy().view("<f2").astype(np.float64)
    errors = np.abs(quants.dequantize(data, "Q8_0", 192).astype(np.float64) - values).reshape(-1, 32)
    assert (errors <= steps * (0.5 + 1e-4)).all()
    largest = np.abs(values).reshape(-1, 32).max(1)
    assert (steps[:, 0] <= largest / 127 * (1 + 2**-10) + 2.0**-24).all()


def test_eight_bits_round_half_to_even_and_reach_both_ends() -> None:
    values = np.array([[127, -127, 0.5, 1.5, 2.5, -0.5, -1.5, *[0] * 25]], np.float32)
    assert quants.dequantize(quants.quantize(values, "Q8_0"), "Q8_0", 32).tolist() == [
        [127, -127, 0, 2, 2, 0, -2, *[0] * 25]
    ]


def test_eight_bits_of_values_beyond_a_float16_scale_are_damaged_and_not_wrong() -> None:
    values = np.zeros((2, 32), np.float32)
    values[:, 5] = 8.2e6, 8.6e6
    data = quants.quantize(values, "Q8_0")
    assert np.isnan(data[1, :2].view("<f2")) and not data[1, 2:].any()
    found = quants.dequantize(data, "Q8_0", 32)
    assert found[0, 5] == pytest.approx(8.2e6, rel=0.005)
    assert np.isnan(found[1]).all()


def test_rows_in_any_layout_are_quantized_alike(rows: np.ndarray) -> None:
    for kind in quants.HELD:
        whole = quants.quantize(rows, kind)
        assert np.array_equal(quants.quantize(np.asfortranarray(rows), kind), whole)
        assert np.array_equal(quants.quantize(rows[::2], kind), whole[::2])


def test_a_tensor_is_quantized_in_parts_as_in_one_piece(rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = weights.WeightTensor(name="t", shape=(0, 192), kind="F32", data=np.empty((0, 768), np.uint8))
    tensor = tensor.replaced(rows)
    whole = tensor.quantized("Q4_1")
    monkeypatch.setattr(weights, "_PART_VALUES", 7 * 192)
    assert np.array_equal(tensor.quantized("Q4_1").data, whole.data)
    assert whole.quantized("Q4_1") is whole


def test_rows_that_do_not_fit_a_type_are_refused() -> None:
    for kind, columns in (("Q4_1", 48), ("Q8_0", 33), ("Q6_K", 256)):
        with pytest.raises(Unsupported, match=kind):
            quants.quantize(np.zeros((2, columns), np.float32), kind)
