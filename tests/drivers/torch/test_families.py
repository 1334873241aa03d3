"""Every family against transformers, on tiny random models, from safetensors and from GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llm_os.drivers.formats.image import ModelImage, open_image

VOCAB = 261
# Sizes that are no multiple of a tile or a vector, grouped queries, and windows shorter than the test's sequences.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 256,
}
GEMMA_ROPE = {
    "sliding_attention": PLAIN,
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
GEMMA_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 10, "rope_parameters": PLAIN}),
    "llama3": ("Llama", {"head_dim": 10, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 10, "sliding_window": 21, "rope_parameters": PLAIN}),
    "qwen2": ("Qwen2", {"use_sliding_window": False, "rope_parameters": PLAIN}),
    "qwen3": ("Qwen3", {"head_dim": 14, "rope_parameters": PLAIN}),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 14,
            "sliding_window": 21,
            "layer_types": GEMMA_LAYERS,
            "rope_parameters": GEMMA_ROPE,
            "query_pre_attn_scalar": 14,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 30, "rope_parameters": PLAIN}),
    "phi3-longrope": ("Phi3", {"sliding_window": None, "rope_parameters": LONGROPE}),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """saved(name) -> (transformers' model, its safetensors directory)."""
    import transformers

    made: dict[str, tuple[Any, Path]] = {}

    def build(name: str) -> tuple[Any, Path]:
        if name not in made:
            kind, options = FAMILIES[name]
            config = getattr(transformers, f"{kind}Config")(
                **(SIZES | {"num_hidden_layers": 3 if kind == "Gemma3Text" else 2} | options)
            )
            torch.manual_seed(len(name))
            kind = kind.replace("Text", "")
            model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:  # norms and biases are ones and zeros at first: a test of nothing
                        parameter.add_(0.3 * torch.randn_like(parameter))
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            write_tokenizer(directory)
            made[name] = model, directory
        return made[name]

    return build


def tokens() -> list[str]:
    return ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]


def write_tokenizer(directory: Path) -> None:
    library = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens())}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(tokens()[:4])
    library.save(str(directory / "tokenizer.json"))


def write_gguf(image: ModelImage, path: Path) -> None:
    """The model of a safetensors directory as llama.cpp's converter would write it."""
    a = image.hyperparameters
    family = "llama" if a.family == "mistral" else a.family
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(len(a.layers))
    writer.add_context_length(a.context_length)
    writer.add_embedding_length(a.hidden)
    writer.add_feed_forward_length(a.intermediate)
    writer.add_head_count(a.heads)
    writer.add_head_count_kv(a.kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    full = a.layers[-1].rope
    writer.add_rope_dimension_count(full.dim)
    writer.add_rope_freq_base(full.base)
    windows = [layer.window for layer in a.layers]
    if any(windows):
        writer.add_sliding_window(max(window or 0 for window in windows))
        if not all(windows):
            writer.add_sliding_window_pattern([window is not None for window in windows])
    if family == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    elif full.factors is not None:
        names = ["rope_factors_short", "rope_factors_long"] if family == "phi3" else ["rope_freqs"]
        for name in names:
            writer.add_tensor(f"{name}.weight", np.array(full.factors, np.float32))
        if family == "phi3":
            writer.add_rope_scaling_attn_factors(full.attention_factor)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * 4 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name in image.weights.names():
        array = image.weights[name].float32()
        if family == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
            heads = a.heads if ".attn_q." in name else a.kv_heads
            array = array.reshape(heads, 2, a.head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)  # interleaved
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(params=["safetensors", "gguf"])
def source(request: Any) -> str:
    return request.param


@pytest.fixture
def opened(saved, source, tmp_path):
    """opened(name) -> (transformers' model, image from the source under test)."""

    def build(name: str) -> tuple[Any, ModelImage]:
        model, directory = saved(name)
        image = open_image(directory)
        if source == "gguf":
            write_gguf(image, tmp_path / "tiny.gguf")
            image.close()
            image = open_image(tmp_path / "tiny.gguf")
        return model, image

    return build


def reference(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(opened, bench, source, name):
    model, image = opened(name)
    # llama.cpp's files of mistral say llama and have no window: those sequences stay within it.
    limit = 20 if name == "mistral" and source == "gguf" else 90
    bench = bench(image.hyperparameters, image.weights, "exact", 16, 40)
    image.close()
    numbers = np.random.default_rng(1)
    first, second, third = (numbers.integers(0, VOCAB, n).tolist() for n in (limit, limit // 2, limit - 3))
    expected = [reference(model, ids) for ids in (first, second, third)]

    (prefill,) = bench.feed((first[:-2], 0, (3, 9, 4, 5, 6, 7)))
    torch.testing.assert_close(prefill, expected[0][:-2], atol=1e-4, rtol=0)
    (decode,) = bench.feed((first[-2:-1], limit - 2, (3, 9, 4, 5, 6, 7)))
    torch.testing.assert_close(decode, expected[0][-2:-1], atol=1e-4, rtol=0)
    bench.feed((third[:11], 0, (30, 20, 21, 22, 23, 24)))
    mixed = bench.feed(
        (first[-1:], limit - 1, (3, 9, 4, 5, 6, 7)),
        (second, 0, (10, 12, 14)),
        (third[11:], 11, (30, 20, 21, 22, 23, 24)),
    )
    for rows, wanted in zip(mixed, (expected[0][-1:], expected[1], expected[2][11:]), strict=True):
        torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=0)
