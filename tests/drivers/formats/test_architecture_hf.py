"""Hyperparameters from config.json, in the old spelling and in transformers 5's, against transformers' own reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_os.drivers.formats.architecture import Architecture, Rope
from llm_os.drivers.formats.fields import Fields
from llm_os.drivers.formats.hf_architecture import hf_architecture
from llm_os.drivers.formats.json_files import read_object
from llm_os.kernel.errors import FormatError, Unsupported

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {"short_factor": [1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0]}


def read(config: dict[str, Any], has_head: bool = True) -> Architecture:
    return hf_architecture(Fields({**COMMON, **config}, "config.json"), has_head=has_head)


def without(*fields: str) -> dict[str, Any]:
    return dict.fromkeys(fields)


# name -> (config, layers' windows, bases)
CONFIGS: dict[str, tuple[dict[str, Any], list[int | None], list[float]]] = {
    "llama": ({"model_type": "llama", "rope_theta": 5e5}, [None] * 3, [5e5] * 3),
    "llama, new": (
        {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        [None] * 3,
        [5e5] * 3,
    ),
    "mistral by default": ({"model_type": "mistral", "max_position_embeddings": 8192}, [4096] * 3, [1e4] * 3),
    "mistral without a window": ({"model_type": "mistral", "sliding_window": None}, [None] * 3, [1e4] * 3),
    "mistral with a window": ({"model_type": "mistral", "sliding_window": 16}, [16] * 3, [1e4] * 3),
    "qwen2 with an unused window": ({"model_type": "qwen2", "sliding_window": 16}, [None] * 3, [1e4] * 3),
    "qwen2 with a window": (
        {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
        [None, 16, 16],
        [1e4] * 3,
    ),
    "qwen3": ({"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6}, [None] * 3, [1e6] * 3),
    "gemma3, old": (
        {
            "model_type": "gemma3_text",
            "head_dim": 16,
            "sliding_window": 16,
            "sliding_window_pattern": 3,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        [16, 16, None],
        [1e4, 1e4, 1e6],
    ),
    "gemma3, new": (
        {
            "model_type": "gemma3_text",
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
            },
        },
        [16, None, 16],
        [3e4, 2e6, 3e4],
    ),
    "phi3": ({"model_type": "phi3", "sliding_window": 20}, [20] * 3, [1e4] * 3),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_layers_have_the_windows_and_bases_of_the_config(name: str) -> None:
    config, windows, bases = CONFIGS[name]
    layers = read(config).layers
    assert [layer.window for layer in layers] == windows
    assert [layer.rope.base for layer in layers] == bases


def frequencies(rope: Rope) -> list[float]:
    factors = rope.factors or (1.0,) * (rope.dim // 2)
    return [rope.base ** (-2 * index / rope.dim) / factor for index, factor in enumerate(factors)]


ROPES: dict[str, dict[str, Any]] = {
    "llama3": {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "linear": {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, new": {
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    },
    "longrope": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", **LONGROPE},
    },
    "longrope, new": {
        "model_type": "phi3",
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.25,
            **LONGROPE,
        },
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", list(ROPES))
def test_rope_scaling_is_that_of_transformers(name: str) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = ROPES[name]
    oracle = AutoConfig.for_model(**{**COMMON, **config})
    kind = oracle.rope_parameters["rope_type"]
    expected, attention_factor = ROPE_INIT_FUNCTIONS[kind](oracle, "cpu")
    rope = read(config).layers[0].rope
    assert rope.dim == 2 * len(expected)
    assert frequencies(rope) == pytest.approx(expected.tolist(), rel=1e-6)
    assert rope.attention_factor == pytest.approx(attention_factor)


def test_gemma3s_linear_scaling_holds_for_full_layers_only() -> None:
    config = {
        "model_type": "gemma3_text",
        "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8},
    }
    local, _, full = read(config).layers
    assert local.rope.factors is None
    assert full.rope.factors == (8.0,) * 128


def test_longrope_ends_where_the_short_factors_do() -> None:
    assert read(ROPES["longrope"]).context_length == 64
    same = {**ROPES["longrope"], "rope_scaling": {"type": "longrope", "short_factor": [2] * 3, "long_factor": [2] * 3}}
    assert read(same).context_length == 128


def test_gemma3_is_found_inside_a_multimodal_model() -> None:
    text = {"model_type": "gemma3_text", **COMMON, "query_pre_attn_scalar": 64, "hidden_size": 48}
    a = read({"model_type": "gemma3", "text_config": text, "vision_config": {}, "vocab_size": None})
    assert (a.family, a.hidden, a.head_dim, a.attention_scale) == ("gemma3", 48, 256, 0.125)
    assert a.tied_embeddings and a.qk_norm and a.post_norms
    assert a.embedding_scale == pytest.approx(48**0.5)
    assert a.activation == "gelu_tanh"


def test_the_published_gemma3_4b_config_leaves_out_what_is_default() -> None:
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    a = hf_architecture(Fields({"model_type": "gemma3", "text_config": text}, "config.json"), has_head=False)
    assert (a.vocab_size, a.heads, a.kv_heads, a.head_dim, a.context_length) == (262208, 8, 4, 256, 131072)
    assert [index for index, layer in enumerate(a.layers) if layer.window is None] == [5, 11, 17, 23, 29]


@pytest.mark.parametrize(
    ("family", "qkv_bias", "qk_norm", "head_dim"),
    [("llama", False, False, 8), ("qwen2", True, False, 8), ("qwen3", False, True, 128), ("phi3", False, False, 8)],
)
def test_families_differ_as_in_transformers(family: str, qkv_bias: bool, qk_norm: bool, head_dim: int) -> None:
    a = read({"model_type": family})
    assert (a.qkv_bias, a.qk_norm, a.head_dim) == (qkv_bias, qk_norm, head_dim)
    assert a.attention_scale == pytest.approx(head_dim**-0.5)


@pytest.mark.parametrize(("field", "has_head", "tied"), [(True, True, True), (False, True, False), (None, False, True)])
def test_the_head_is_tied_where_the_config_says_so(field: bool | None, has_head: bool, tied: bool) -> None:
    config = {"model_type": "llama", "tie_word_embeddings": field}
    assert read(config, has_head).tied_embeddings is tied


WRONG: dict[str, dict[str, Any]] = {
    "config.json: hidden_size is missing": without("hidden_size"),
    "num_hidden_layers is 1001; it must be from 1 to 1000": {"num_hidden_layers": 1001},
    "vocab_size is 1.5; it must be an integer": {"vocab_size": 1.5},
    "vocab_size is True; it must be an integer": {"vocab_size": True},
    "num_attention_heads is 4; it must be a multiple of num_key_value_heads 3": {"num_key_value_heads": 3},
    "hidden_size is 33; it must be a multiple": {"hidden_size": 33},
    "head_dim is 7; it must be even": {"head_dim": 7},
    "rms_norm_eps is -1": {"rms_norm_eps": -1},
    "rope_scaling.factor is missing": {"rope_scaling": {"rope_type": "linear"}},
    "rope_scaling is 'x'; it must be an object": {"rope_scaling": "x"},
    "rope_scaling.high_freq_factor is 1; it must be more": {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}
    },
    "rope_scaling.short_factor has 3 elements; it must be a list of 4": {
        "rope_scaling": {"rope_type": "longrope", **LONGROPE}
    },
    "partial_rotary_factor is 0.4: it rotates 3 of 8": {"partial_rotary_factor": 0.4},
    "layer_types must be a list of num_hidden_layers = 3": {"model_type": "qwen2", "layer_types": ["full_attention"]},
    "tie_word_embeddings is 'yes'": {"tie_word_embeddings": "yes"},
}


@pytest.mark.parametrize("problem", list(WRONG))
def test_a_wrong_field_is_named(problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        read({"model_type": "llama", **WRONG[problem]})


VARIANTS: dict[str, dict[str, Any]] = {
    "model_type 'mamba' is not supported; supported are llama, mistral, qwen2": {"model_type": "mamba"},
    "rope_scaling.rope_type is 'yarn'": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "attention_bias is True": {"attention_bias": True},
    "hidden_act is 'gelu'": {"hidden_act": "gelu"},
    "quantization_config is": {"quantization_config": {"quant_method": "gptq"}},
    "layer_types has 'chunked_attention'": {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3},
    "final_logit_softcapping is 30": {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
}


@pytest.mark.parametrize("problem", list(VARIANTS))
def test_a_variant_that_would_answer_wrongly_is_unsupported(problem: str) -> None:
    with pytest.raises(Unsupported, match=problem):
        read({"model_type": "llama", **VARIANTS[problem]})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ("{" + "," * 2**21, "more than 1048576"),
    ],
)
def test_json_that_is_no_object_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=problem):
        read_object(path)


def test_a_huge_json_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    with pytest.raises(FormatError, match="has 109 bytes; the limit is 99"):
        read_object(path, limit=99)
