"""Hyperparameters of a decoder, in one struct for every family and both file formats. No tensors, no tokenizer."""

from __future__ import annotations

from msgspec import Struct


class Rope(Struct, frozen=True, kw_only=True):
    """Rotary position embedding (Su et al. 2021), half-split layout ("NeoX"), over the first `dim` of each head.

    `factors` divide the inverse frequencies, one for each of dim/2 (llama3, longrope, linear scaling all reduce to
    them); `attention_factor` multiplies cos and sin.
    """

    base: float
    dim: int
    factors: tuple[float, ...] | None = None
    attention_factor: float = 1.0


class Layer(Struct, frozen=True, kw_only=True):
    """What may differ between the layers of one model."""

    rope: Rope
    window: int | None = None  # a query sees at most this many positions, itself included; None is all


class Architecture(Struct, frozen=True, kw_only=True):
    """A decoder-only transformer. Weights use GGUF's names and conventions, whatever file they come from."""

    family: str  # llama, mistral, qwen2, qwen3, gemma3, phi3
    vocab_size: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    layers: tuple[Layer, ...]
    activation: str = "silu"  # or "gelu_tanh"
    qk_norm: bool = False  # RMSNorm over head_dim of each query and key head, before rope
    qkv_bias: bool = False
    post_norms: bool = False  # RMSNorm on the outputs of attention and of the feed-forward (gemma)
    embedding_scale: float = 1.0
    attention_scale: float  # multiplies the scores; usually head_dim ** -0.5
    tied_embeddings: bool = False  # the output head is the embedding
