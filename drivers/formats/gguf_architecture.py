"""Hyperparameters from GGUF metadata. Follows llama.cpp where a key is optional. Reads no weights but rope factors."""

from __future__ import annotations

from typing import Any

from llm_os.drivers.formats import fields as limits
from llm_os.drivers.formats.architecture import Architecture, Layer, Rope
from llm_os.drivers.formats.fields import Fields
from llm_os.drivers.formats.gguf import GgufFile
from llm_os.drivers.formats.mapped import shown
from llm_os.kernel.errors import FormatError, Unsupported

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "phi3")  # mistral's files say llama

# Tensors that belong to the hyperparameters.
ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})

_GEMMA3_27B_LAYERS = 62  # the only gemma3 whose attention scale is not head_dim ** -0.5


def gguf_architecture(file: GgufFile) -> Architecture:
    """The architecture of a GGUF file.

    Raises Unsupported for an unknown architecture or variant, FormatError for a missing key or a value out of range.
    """
    name = str(file.path)
    family = Fields(file.metadata, name).text("general.architecture")
    if family not in FAMILIES:
        raise Unsupported(
            f"{name}: architecture {shown(family)} is not supported; supported are {', '.join(FAMILIES)} "
            "(mistral's files say llama)"
        )
    fields = Fields(file.metadata, name, prefix=f"{family}.")
    _refuse_variants(fields)
    layers = fields.integer("block_count", 1, limits.MAX_LAYERS)
    hidden = fields.integer("embedding_length", 1, limits.MAX_HIDDEN)
    heads = _uniform(fields, "attention.head_count", limits.MAX_HEADS, layers)
    kv_heads = _uniform(fields, "attention.head_count_kv", limits.MAX_HEADS, layers, default=heads)
    if heads % kv_heads:
        fields.fail("attention.head_count", f"is {heads}; it must be a multiple of attention.head_count_kv {kv_heads}")
    if fields.get("attention.key_length") is None and hidden % heads:
        fields.fail("embedding_length", f"is {hidden}; it must be a multiple of attention.head_count {heads}")
    head_dim = fields.integer("attention.key_length", 2, limits.MAX_HEAD_DIM, default=hidden // heads)
    if head_dim % 2:
        fields.fail("attention.key_length", f"is {head_dim}; it must be even")
    if fields.integer("attention.value_length", 1, limits.MAX_HEAD_DIM, default=head_dim) != head_dim:
        fields.unsupported("attention.value_length", f"only the length of keys, {head_dim}, is supported")
    context, rope = _rope(fields, file, head_dim)
    gemma = family == "gemma3"
    return Architecture(
        family=family,
        vocab_size=_vocab_size(file),
        hidden=hidden,
        intermediate=_uniform(fields, "feed_forward_length", limits.MAX_INTERMEDIATE, layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=context,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0),
        layers=_layers(fields, rope, layers, context, gemma),
        activation="gelu_tanh" if gemma else "silu",
        qk_norm=family in ("qwen3", "gemma3"),
        qkv_bias=family in ("llama", "qwen2") and "blk.0.attn_q.bias" in file,
        post_norms=gemma,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        attention_scale=_attention_scale(fields, hidden, heads, head_dim, gemma and layers == _GEMMA3_27B_LAYERS),
        tied_embeddings="output.weight" not in file,
    )


def _refuse_variants(fields: Fields) -> None:
    for key in ("expert_count", "attn_logit_softcapping", "final_logit_softcapping"):
        if fields.get(key):
            fields.unsupported(key, "models with this are not supported")
    if (fields.get("attention.causal")) is False:
        fields.unsupported("attention.causal", "only causal decoders are supported")


def _uniform(fields: Fields, key: str, limit: int, layers: int, default: Any = ...) -> int:
    """An integer that may be spelled as a list with one for each layer, if they are all the same."""
    value = fields.get(key)
    if isinstance(value, list):
        if len(value) != layers:
            fields.fail(key, f"has {len(value)} elements; block_count is {layers}")
        if any(item != value[0] for item in value):
            fields.unsupported(key, "layers that differ in it are not supported")
        return Fields({key: value[0]}, fields.file).integer(key, 1, limit)
    return fields.integer(key, 1, limit, default)


def _vocab_size(file: GgufFile) -> int:
    shape = file["token_embd.weight"].shape
    if len(shape) != 2 or shape[0] > limits.MAX_VOCAB:
        raise FormatError(
            f"{file.path}: tensor token_embd.weight has shape {list(shape)}; expected a vocabulary of at most "
            f"{limits.MAX_VOCAB} times embedding_length"
        )
    return shape[0]


def _attention_scale(fields: Fields, hidden: int, heads: int, head_dim: int, per_hidden: bool) -> float:
    default = (hidden / heads if per_hidden else head_dim) ** -0.5
    return fields.number("attention.scale", 0, 1e6, default) or default  # 0 stands for the default


def _rope(fields: Fields, file: GgufFile, head_dim: int) -> tuple[int, Rope]:
    """The context length, and the rope of layers without a window."""
    context = fields.integer("context_length", 1, limits.MAX_CONTEXT)
    base = fields.number("rope.freq_base", 1, 1e15, 10_000.0)
    dim = fields.integer("rope.dimension_count", 2, head_dim, default=head_dim)
    if dim % 2:
        fields.fail("rope.dimension_count", f"is {dim}; it must be even")
    scaling = fields.text("rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "longrope"):
        fields.unsupported("rope.scaling.type", "supported are none, linear and longrope")
    scale = 1.0
    if scaling == "linear":
        scale = fields.number("rope.scaling.factor", 0, 1e6, fields.get("rope.scale_linear") or 1.0) or 1.0
    factors = [scale] * (dim // 2)
    if "rope_freqs.weight" in file:
        factors = [scale * factor for factor in _factors(file, "rope_freqs.weight", dim)]
    attention_factor = 1.0
    if "rope_factors_short.weight" in file or "rope_factors_long.weight" in file:
        # transformers switches from the short to the long factors when a sequence outgrows the original context, and
        # recomputes all its keys. Keys in pages cannot follow that, so the context ends where the short factors do.
        factors = _factors(file, "rope_factors_short.weight", dim)
        if factors != _factors(file, "rope_factors_long.weight", dim):
            original = fields.integer("rope.scaling.original_context_length", 1, limits.MAX_CONTEXT)
            context = min(context, original)
        attention_factor = fields.number("rope.scaling.attn_factor", 1e-6, 1e6, 1.0)
    scaled = any(factor != 1.0 for factor in factors)
    return context, Rope(
        base=base, dim=dim, factors=tuple(factors) if scaled else None, attention_factor=attention_factor
    )


def _factors(file: GgufFile, name: str, dim: int) -> list[float]:
    tensor = file[name]
    if tensor.shape != (dim // 2,):
        raise FormatError(f"{file.path}: tensor {name} has shape {list(tensor.shape)}; expected [{dim // 2}]")
    values: list[float] = tensor.float32().tolist()
    if not all(1e-6 <= value <= 1e6 for value in values):
        raise FormatError(f"{file.path}: tensor {name} has values out of range; they must be from 1e-06 to 1e+06")
    return values


def _layers(fields: Fields, rope: Rope, count: int, context: int, gemma: bool) -> tuple[Layer, ...]:
    window = fields.integer("attention.sliding_window", 0, limits.MAX_WINDOW, 0)
    width = window if 0 < window < context else None
    if not gemma:
        return (Layer(rope=rope, window=width),) * count
    if not window:
        return (Layer(rope=rope),) * count
    local = Layer(
        rope=Rope(base=fields.number("rope.freq_base_swa", 1, 1e15, 10_000.0), dim=rope.dim),
        window=width,
    )
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != count:
            fields.fail("attention.sliding_window_pattern", f"has {len(pattern)} elements; block_count is {count}")
        return tuple(local if windowed else Layer(rope=rope) for windowed in pattern)
    period = fields.integer("attention.sliding_window_pattern", 1, limits.MAX_LAYERS, 6)
    return tuple(Layer(rope=rope) if (index + 1) % period == 0 else local for index in range(count))
