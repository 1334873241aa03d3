"""Hyperparameters from Hugging Face's `config.json`. Reads no weights.

What a file leaves out has the default of transformers' configuration class of that family.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llm_os.drivers.formats import fields as limits
from llm_os.drivers.formats.architecture import Architecture, Layer
from llm_os.drivers.formats.fields import Fields
from llm_os.drivers.formats.hf_rope import hf_rope
from llm_os.drivers.formats.mapped import shown
from llm_os.kernel.errors import Unsupported

# model_type -> family
FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}


_FULL, _SLIDING = "full_attention", "sliding_attention"


class _Defaults(NamedTuple):
    context: int
    kv_heads: int | None = 32  # None: as many as heads
    head_dim: int | None = None  # None: hidden / heads
    norm_eps: float = 1e-6
    window: int | None = None


_DEFAULTS = {
    "llama": _Defaults(2048, kv_heads=None),
    "mistral": _Defaults(131_072, kv_heads=8, window=4096),
    "qwen2": _Defaults(32_768, window=4096),
    "qwen3": _Defaults(32_768, head_dim=128, window=4096),
    "gemma3": _Defaults(131_072, kv_heads=4, head_dim=256, window=4096),
    "phi3": _Defaults(4096, kv_heads=None, norm_eps=1e-5),
}
# The published gemma3 configurations leave out even these.
_GEMMA3 = {"vocab_size": 262_208, "num_attention_heads": 8}


def hf_family(config: Fields) -> str:
    """The family that `model_type` names. Raises Unsupported for one that is not known."""
    kind = config.text("model_type")
    if kind not in FAMILIES:
        raise Unsupported(
            f"{config.file}: model_type {shown(kind)} is not supported; supported are {', '.join(FAMILIES)}"
        )
    if config.get("quantization_config") is not None:
        config.unsupported("quantization_config", "quantized safetensors are not supported; take a GGUF file instead")
    return FAMILIES[kind]


def hf_architecture(config: Fields, *, has_head: bool) -> Architecture:
    """The architecture of `config.json`; `has_head` says whether the weights have an output head of their own.

    Raises Unsupported for an unknown family or variant, FormatError for a missing field or a value out of range.
    """
    family = hf_family(config)
    gemma = family == "gemma3"
    tied = config.flag("tie_word_embeddings", gemma or not has_head)
    text = config.section("text_config") if gemma else None
    config = text or config
    defaults = _DEFAULTS[family]
    optional: dict[str, Any] = _GEMMA3 if gemma else {}
    _refuse_variants(config, gemma)
    layers = config.integer("num_hidden_layers", 1, limits.MAX_LAYERS)
    hidden = config.integer("hidden_size", 1, limits.MAX_HIDDEN)
    heads = config.integer("num_attention_heads", 1, limits.MAX_HEADS, optional.get("num_attention_heads", ...))
    kv_heads = config.integer("num_key_value_heads", 1, limits.MAX_HEADS, defaults.kv_heads or heads)
    if heads % kv_heads:
        config.fail("num_attention_heads", f"is {heads}; it must be a multiple of num_key_value_heads {kv_heads}")
    head_dim = _head_dim(config, defaults.head_dim, hidden, heads)
    context = positions = config.integer("max_position_embeddings", 1, limits.MAX_CONTEXT, defaults.context)
    norm_eps = config.number("rms_norm_eps", 1e-12, 1.0, defaults.norm_eps)
    kinds, window = _layer_kinds(config, family, layers)
    ropes = {}
    for kind in sorted(set(kinds)):
        parameters, theta = _rope_parameters(config, family, kind)
        ropes[kind], held = hf_rope(config, parameters, head_dim, theta, positions)
        context = min(context, held)
    width = window if window is not None and window < context else None
    scalar = config.number("query_pre_attn_scalar", 1e-6, 1e9, 256) if gemma else head_dim
    return Architecture(
        family=family,
        vocab_size=config.integer("vocab_size", 1, limits.MAX_VOCAB, optional.get("vocab_size", ...)),
        hidden=hidden,
        intermediate=config.integer("intermediate_size", 1, limits.MAX_INTERMEDIATE),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=context,
        norm_eps=norm_eps,
        layers=tuple(Layer(rope=ropes[kind], window=width if kind == _SLIDING else None) for kind in kinds),
        activation="gelu_tanh" if gemma else "silu",
        qk_norm=family in ("qwen3", "gemma3"),
        qkv_bias=family == "qwen2",
        post_norms=gemma,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        attention_scale=scalar**-0.5,
        tied_embeddings=tied,
    )


def _refuse_variants(config: Fields, gemma: bool) -> None:
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if config.flag(key, False):
            config.unsupported(key, "models with this are not supported")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            config.unsupported(key, "models with this are not supported")
    key, expected = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    if config.text(key, expected) != expected:
        config.unsupported(key, f"only {expected} is supported in this family")


def _head_dim(config: Fields, default: int | None, hidden: int, heads: int) -> int:
    if default is None and config.get("head_dim") is None and hidden % heads:
        config.fail("hidden_size", f"is {hidden}; it must be a multiple of num_attention_heads {heads}")
    head_dim = config.integer("head_dim", 2, limits.MAX_HEAD_DIM, default or hidden // heads)
    if head_dim % 2:
        config.fail("head_dim", f"is {head_dim}; it must be even")
    return head_dim


def _layer_kinds(config: Fields, family: str, count: int) -> tuple[tuple[str, ...], int | None]:
    """_FULL or _SLIDING for each layer, and the window of the latter, None where there is none after all."""
    window = config.get("sliding_window") if "sliding_window" in config else _DEFAULTS[family].window
    if family in ("qwen2", "qwen3") and not config.flag("use_sliding_window", False):
        window = None
    if window is not None:
        window = config.integer("sliding_window", 1, limits.MAX_WINDOW, window)
    if family in ("llama", "mistral", "phi3"):  # these have no mixed layers, whatever layer_types says
        return (_FULL if window is None else _SLIDING,) * count, window
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != count:
            config.fail("layer_types", f"must be a list of num_hidden_layers = {count} strings")
        if strange := [kind for kind in kinds if kind not in (_FULL, _SLIDING)]:
            raise Unsupported(
                f"{config.file}: layer_types has {shown(strange[0])}; supported are {_FULL} and {_SLIDING}"
            )
        return tuple(kinds), window
    if family == "gemma3":
        period = config.integer("sliding_window_pattern", 1, limits.MAX_LAYERS, 6)
        return tuple(_SLIDING if (index + 1) % period else _FULL for index in range(count)), window
    first = count if window is None else config.integer("max_window_layers", 0, 2**31, 28)
    return tuple(_SLIDING if index >= first else _FULL for index in range(count)), window


def _rope_parameters(config: Fields, family: str, kind: str) -> tuple[Fields, float]:
    """What describes the rope of a kind of layer, and its base where that does not say."""
    none = Fields({}, config.file)
    old, new = config.section("rope_scaling"), config.section("rope_parameters")
    new = (new.section(kind) if new and kind in new else new) or none
    if family != "gemma3":
        return old or new, config.number("rope_theta", 1, 1e15, 10_000.0)
    if kind == _FULL:
        return old or new, config.number("rope_theta", 1, 1e15, 1_000_000.0)
    return new, config.number("rope_local_base_freq", 1, 1e15, 10_000.0)
