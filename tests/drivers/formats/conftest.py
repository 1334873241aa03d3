"""Small complete models from the reference writers: gguf-py for GGUF, the safetensors library for directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS, CONTEXT = 32, 64, 4, 2, 8, 2, 64


def vocabulary() -> tuple[list[str], list[str]]:
    """Every byte, two merges, three special tokens."""
    merges = ["h e", "he l"]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges]
    return tokens + SPECIAL, merges


def layer_shapes() -> dict[str, tuple[int, ...]]:
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return {
        "attn_norm": (HIDDEN,),
        "attn_q": (queries, HIDDEN),
        "attn_k": (keys, HIDDEN),
        "attn_v": (keys, HIDDEN),
        "attn_output": (HIDDEN, queries),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INTERMEDIATE, HIDDEN),
        "ffn_up": (INTERMEDIATE, HIDDEN),
        "ffn_down": (HIDDEN, INTERMEDIATE),
    }


def model_shapes() -> dict[str, tuple[int, ...]]:
    size = len(vocabulary()[0])
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (size, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (size, HIDDEN),
    }
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in layer_shapes().items()}
    return shapes


def hyperparameters(family: str) -> dict[str, Any]:
    return {
        f"{family}.block_count": LAYERS,
        f"{family}.context_length": CONTEXT,
        f"{family}.embedding_length": HIDDEN,
        f"{family}.feed_forward_length": INTERMEDIATE,
        f"{family}.attention.head_count": HEADS,
        f"{family}.attention.head_count_kv": KV_HEADS,
        f"{family}.attention.key_length": HEAD_DIM,
        f"{family}.attention.value_length": HEAD_DIM,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{family}.rope.dimension_count": HEAD_DIM,
        f"{family}.rope.freq_base": 10000.0,
    }


WriteGguf = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    """write_gguf(family="llama", metadata={key: value or None}, tensors={name: array or None}) -> path.

    A tiny sound model by default; None leaves a key or a tensor out.
    """

    def write(
        family: str = "llama",
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray | None] | None = None,
        name: str = "tiny.gguf",
    ) -> Path:
        tokens, merges = vocabulary()
        special = len(tokens) - len(SPECIAL)
        values: dict[str, Any] = hyperparameters(family)
        values |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * special + [3] * len(SPECIAL),
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": special,
            "tokenizer.ggml.eos_token_id": special + 2,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": TEMPLATE,
            "general.sampling.temp": 0.5,
            "general.sampling.top_k": 40,
        }
        values |= metadata or {}
        rng = np.random.default_rng(0)
        arrays: dict[str, np.ndarray | None] = {
            key: rng.standard_normal(shape, np.float32) for key, shape in model_shapes().items()
        }
        arrays |= tensors or {}
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, family)
        for key, value in values.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif value is not None:
                writer.add_array(key, value)
        quantized = {
            "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
            "blk.1.ffn_up.weight": gguf.GGMLQuantizationType.Q4_0,
        }
        for key, array in arrays.items():
            if array is not None and key in quantized and array.shape[-1] % 32 == 0:
                writer.add_tensor(key, gguf.quants.quantize(array, quantized[key]), raw_dtype=quantized[key])
            elif array is not None:
                writer.add_tensor(key, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    """A tiny sound llama in one safetensors file, with all its JSON files."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    tokens, merges = vocabulary()
    rng = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((len(tokens), HIDDEN), np.float32),
        "model.norm.weight": rng.standard_normal(HIDDEN, np.float32),
        "lm_head.weight": rng.standard_normal((len(tokens), HIDDEN), np.float32).astype(np.float16),
    }
    for layer in range(LAYERS):
        for name, shape in layer_shapes().items():
            tensors[f"model.layers.{layer}.{HF_NAMES[name]}.weight"] = rng.standard_normal(shape, np.float32)
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.5, "top_k": 40}))
    library = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split()) for merge in merges])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(SPECIAL)
    library.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """edit_json(path, field=value): changes fields of a JSON object; ... removes one."""

    def edit(path: Path, **fields: Any) -> None:
        value = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))

    return edit
