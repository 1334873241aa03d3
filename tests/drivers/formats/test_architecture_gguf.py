"""Hyperparameters from GGUF metadata, and the weights that go with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.formats.gguf import GgufFile
from llm_os.drivers.formats.gguf_architecture import ROPE_TENSORS, gguf_architecture
from llm_os.drivers.formats.gguf_weights import GgufWeights
from llm_os.drivers.formats.shapes import check_tensors
from llm_os.kernel.errors import FormatError, Unsupported

WriteGguf = Callable[..., Path]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 32, 4, 2, 8, 64
QUERIES, KEYS = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM


def opened(path: Path) -> tuple[Architecture, GgufWeights]:
    file = GgufFile(path)
    architecture = gguf_architecture(file)
    weights = GgufWeights(file, architecture)
    check_tensors(weights.shapes(), architecture, str(path), ROPE_TENSORS)
    return architecture, weights


def in_layers(**shapes: tuple[int, ...] | None) -> dict[str, np.ndarray | None]:
    """Random tensors of these shapes for both layers; None leaves them out. __ stands for a dot."""
    rng = np.random.default_rng(1)
    return {
        f"blk.{layer}.{name.replace('__', '.')}": None if shape is None else rng.standard_normal(shape, np.float32)
        for layer in range(2)
        for name, shape in shapes.items()
    }


QK_NORMS = {"attn_q_norm__weight": (HEAD_DIM,), "attn_k_norm__weight": (HEAD_DIM,)}
BIASES = {"attn_q__bias": (QUERIES,), "attn_k__bias": (KEYS,), "attn_v__bias": (KEYS,)}
POST_NORMS = {"post_attention_norm__weight": (HIDDEN,), "post_ffw_norm__weight": (HIDDEN,)}
FUSED: dict[str, tuple[int, ...] | None] = {
    "attn_q__weight": None,
    "attn_k__weight": None,
    "attn_v__weight": None,
    "ffn_gate__weight": None,
    "attn_qkv__weight": (QUERIES + 2 * KEYS, HIDDEN),
    "ffn_up__weight": (2 * INTERMEDIATE, HIDDEN),
}


def test_llama_has_the_values_of_its_metadata(write_gguf: WriteGguf) -> None:
    a, _ = opened(write_gguf())
    assert (a.family, a.hidden, a.intermediate, a.heads, a.kv_heads, a.head_dim) == ("llama", 32, 64, 4, 2, 8)
    assert (a.vocab_size, a.context_length, len(a.layers)) == (261, 64, 2)
    assert a.norm_eps == pytest.approx(1e-5)
    assert a.attention_scale == pytest.approx(8**-0.5)
    assert not (a.qk_norm or a.qkv_bias or a.post_norms or a.tied_embeddings)
    assert (a.activation, a.embedding_scale) == ("silu", 1.0)
    assert (a.layers[0].rope.base, a.layers[0].rope.dim, a.layers[0].rope.factors) == (10000.0, 8, None)


def test_what_llama_leaves_out_has_llama_cpps_defaults(write_gguf: WriteGguf) -> None:
    optional = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base")
    a, _ = opened(write_gguf(metadata={f"llama.{key}": None for key in optional}))
    assert (a.head_dim, a.layers[0].rope.dim, a.layers[0].rope.base) == (8, 8, 10000.0)


def test_an_absent_output_head_is_the_embedding(write_gguf: WriteGguf) -> None:
    assert opened(write_gguf(tensors={"output.weight": None}))[0].tied_embeddings


def test_llama3s_rope_factors_come_from_their_tensor(write_gguf: WriteGguf) -> None:
    a, _ = opened(write_gguf(tensors={"rope_freqs.weight": np.array([1, 1, 4, 8], np.float32)}))
    assert a.layers[0].rope.factors == (1, 1, 4, 8)


@pytest.mark.parametrize("metadata", [{"llama.rope.scaling.type": "linear"}, {}])
def test_linear_scaling_divides_all_frequencies(write_gguf: WriteGguf, metadata: dict[str, Any]) -> None:
    a, _ = opened(write_gguf(metadata={"llama.rope.scaling.factor": 4.0, **metadata}))
    assert a.layers[0].rope.factors == (4, 4, 4, 4)


def test_qwen2_has_biases(write_gguf: WriteGguf) -> None:
    a, weights = opened(write_gguf("qwen2", tensors=in_layers(**BIASES)))
    assert a.qkv_bias
    assert weights["blk.0.attn_k.bias"].float32().shape == (KEYS,)


def test_qwen3_has_norms_on_queries_and_keys(write_gguf: WriteGguf) -> None:
    a, _ = opened(write_gguf("qwen3", tensors=in_layers(**QK_NORMS)))
    assert a.qk_norm
    assert not a.qkv_bias


def test_phi3_is_fused_and_ends_where_its_short_factors_do(write_gguf: WriteGguf) -> None:
    factors = {
        f"rope_factors_{name}.weight": np.full(3, value, np.float32) for name, value in (("short", 1.5), ("long", 9))
    }
    metadata = {
        "phi3.rope.dimension_count": 6,
        "phi3.rope.scaling.original_context_length": 48,
        "phi3.rope.scaling.attn_factor": 1.25,
        "phi3.attention.sliding_window": 20,
    }
    a, _ = opened(write_gguf("phi3", metadata, {**in_layers(**FUSED), **factors}))
    assert a.context_length == 48
    assert (a.layers[0].rope.dim, a.layers[0].rope.factors, a.layers[0].rope.attention_factor) == (6, (1.5,) * 3, 1.25)
    assert [layer.window for layer in a.layers] == [20, 20]


def test_gemma3_mixes_windowed_and_full_layers(write_gguf: WriteGguf) -> None:
    metadata = {
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
        "gemma3.attention.sliding_window": 16,
        "gemma3.attention.sliding_window_pattern": 2,
    }
    tensors = {**in_layers(**QK_NORMS, **POST_NORMS), "output.weight": None}
    a, _ = opened(write_gguf("gemma3", metadata, tensors))
    local, full = a.layers
    assert (local.window, local.rope.base, local.rope.factors) == (16, 10000.0, None)
    assert (full.window, full.rope.base, full.rope.factors) == (None, 1e6, (8,) * 4)
    assert a.qk_norm and a.post_norms and a.tied_embeddings and a.activation == "gelu_tanh"
    assert a.embedding_scale == pytest.approx(32**0.5)


def test_a_window_as_wide_as_the_context_is_none(write_gguf: WriteGguf) -> None:
    a, _ = opened(write_gguf(metadata={"llama.attention.sliding_window": 64}))
    assert a.layers[0].window is None


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """As in llama.cpp's convert_hf_to_gguf.py."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize(("part", "heads"), [("q", HEADS), ("k", KV_HEADS)])
def test_llamas_queries_and_keys_come_back_in_half_split_order(write_gguf: WriteGguf, part: str, heads: int) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((heads * HEAD_DIM, HIDDEN), np.float32)
    bias = rng.standard_normal(heads * HEAD_DIM, np.float32)
    tensors = {
        **in_layers(**BIASES),
        f"blk.0.attn_{part}.weight": permute(weight, heads),
        f"blk.0.attn_{part}.bias": permute(bias, heads),
    }
    _, weights = opened(write_gguf(tensors=tensors))
    assert np.array_equal(weights[f"blk.0.attn_{part}.weight"].float32(), weight)
    assert np.array_equal(weights[f"blk.0.attn_{part}.bias"].float32(), bias)


def test_other_tensors_and_families_stay_as_they_are_in_the_file(write_gguf: WriteGguf) -> None:
    tensors = in_layers(**BIASES)
    path = write_gguf("qwen2", tensors=tensors)
    file, (_, weights) = GgufFile(path), opened(path)
    for name in file.names():
        assert np.array_equal(weights[name].data, file[name].data)


def test_only_the_rotated_rows_of_a_head_move(write_gguf: WriteGguf) -> None:
    rows = np.repeat(np.arange(QUERIES, dtype=np.float32)[:, None], HIDDEN, axis=1)
    _, weights = opened(write_gguf(metadata={"llama.rope.dimension_count": 4}, tensors={"blk.0.attn_q.weight": rows}))
    assert weights["blk.0.attn_q.weight"].float32()[:8, 0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7]


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama.embedding_length is missing": ({"llama.embedding_length": None}, {}),
    "llama.block_count is 0; it must be from 1 to 1000": ({"llama.block_count": 0}, {}),
    "llama.block_count is 'two'": ({"llama.block_count": "two"}, {}),
    "multiple of attention.head_count_kv 3": ({"llama.attention.head_count_kv": 3}, {}),
    "llama.attention.key_length is 7; it must be even": (
        {"llama.attention.key_length": 7, "llama.attention.value_length": 7},
        {},
    ),
    "llama.rope.dimension_count is 10": ({"llama.rope.dimension_count": 10}, {}),
    "norm_rms_epsilon is nan": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, {}),
    "tensor blk.1.ffn_down.weight is missing; expected with shape \\[32, 64\\]": ({}, {"blk.1.ffn_down.weight": None}),
    "tensor blk.0.attn_v.weight has shape \\[8, 32\\]; expected \\[16, 32\\]": (
        {},
        {"blk.0.attn_v.weight": np.zeros((8, 32), np.float32)},
    ),
    "tensor token_embd.weight is missing": ({}, {"token_embd.weight": None}),
    "rope_freqs.weight has shape \\[3\\]; expected \\[4\\]": ({}, {"rope_freqs.weight": np.ones(3, np.float32)}),
    "rope_freqs.weight has values out of range": ({}, {"rope_freqs.weight": np.zeros(4, np.float32)}),
    "head_count has 3 elements; block_count is 2": ({"llama.attention.head_count": [4, 4, 4]}, {}),
}


@pytest.mark.parametrize("problem", list(WRONG))
def test_a_wrong_field_or_tensor_is_named(write_gguf: WriteGguf, problem: str) -> None:
    metadata, tensors = WRONG[problem]
    with pytest.raises(FormatError, match=problem):
        opened(write_gguf(metadata=metadata, tensors=tensors))


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "architecture 'mamba' is not supported; supported are llama, qwen2, qwen3, gemma3, phi3": ("mamba", {}, {}),
    "expert_count is 8": ("llama", {"llama.expert_count": 8}, {}),
    "rope.scaling.type is 'yarn'": ("llama", {"llama.rope.scaling.type": "yarn"}, {}),
    "value_length is 16": ("llama", {"llama.attention.value_length": 16}, {}),
    "final_logit_softcapping is 30.0": ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, {}),
    "head_count_kv is \\[2, 4\\]; layers that differ": ("llama", {"llama.attention.head_count_kv": [2, 4]}, {}),
    "tensor 'blk.0.attn_output.bias' has no place": (
        "llama",
        {},
        {"blk.0.attn_output.bias": np.zeros(HIDDEN, np.float32)},
    ),
}


@pytest.mark.parametrize("problem", list(VARIANTS))
def test_a_variant_that_would_answer_wrongly_is_unsupported(write_gguf: WriteGguf, problem: str) -> None:
    with pytest.raises(Unsupported, match=problem):
        opened(write_gguf(*VARIANTS[problem]))


@pytest.mark.parametrize(("scale", "expected"), [(0.25, 0.25), (0.0, 16**-0.5), (None, 16**-0.5)])
def test_a_given_attention_scale_counts_unless_it_is_zero(
    write_gguf: WriteGguf, scale: float | None, expected: float
) -> None:
    metadata = {"llama.attention.scale": scale, "llama.attention.key_length": 16, "llama.attention.value_length": 16}
    assert gguf_architecture(GgufFile(write_gguf(metadata=metadata))).attention_scale == pytest.approx(expected)


def test_gemma3_27b_scales_by_hidden_per_head(write_gguf: WriteGguf) -> None:
    metadata = {"gemma3.attention.key_length": 16, "gemma3.attention.value_length": 16}
    small = gguf_architecture(GgufFile(write_gguf("gemma3", metadata)))
    large = gguf_architecture(GgufFile(write_gguf("gemma3", metadata | {"gemma3.block_count": 62})))
    assert small.attention_scale == pytest.approx(16**-0.5)
    assert large.attention_scale == pytest.approx((HIDDEN / HEADS) ** -0.5)
