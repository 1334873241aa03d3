"""Rotary embedding from Hugging Face's `config.json`: both the older spelling (`rope_theta`, `rope_scaling`) and
transformers 5's `rope_parameters`. Computes what transformers' modeling_rope_utils.py does.
"""

from __future__ import annotations

import math

from llm_os.drivers.formats import fields as limits
from llm_os.drivers.formats.architecture import Rope
from llm_os.drivers.formats.fields import Fields

_MAX_FACTOR = 1e6


def hf_rope(config: Fields, parameters: Fields, head_dim: int, theta: float, context: int) -> tuple[Rope, int]:
    """The rope that `parameters` describe, and the context up to which it holds, `context` or less.

    `theta` is the base when `parameters` have none; `config` is where phi3 keeps the rest.
    """
    base = parameters.number("rope_theta", 1, 1e15, theta)
    partial = parameters.number("partial_rotary_factor", 0, 1, config.number("partial_rotary_factor", 0, 1, 1.0))
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2:
        parameters.fail(
            "partial_rotary_factor", f"is {partial:g}: it rotates {dim} of {head_dim} dimensions, not an even number"
        )
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind == "default":
        return Rope(base=base, dim=dim), context
    if kind in ("longrope", "su"):
        return _longrope(config, parameters, base, dim, context)
    if kind == "llama3":
        factors = _llama3(parameters, base, dim, context)
    elif kind == "linear":
        factors = (parameters.number("factor", 1 / _MAX_FACTOR, _MAX_FACTOR),) * (dim // 2)
    else:
        key = "rope_type" if "rope_type" in parameters else "type"
        parameters.unsupported(key, "supported are default, linear, llama3 and longrope")
    return Rope(base=base, dim=dim, factors=factors), context


def _llama3(parameters: Fields, base: float, dim: int, context: int) -> tuple[float, ...]:
    """Llama 3.1's: long wavelengths are stretched, short ones kept, those between interpolated."""
    factor = parameters.number("factor", 1 / _MAX_FACTOR, _MAX_FACTOR)
    low = parameters.number("low_freq_factor", 1e-6, _MAX_FACTOR)
    high = parameters.number("high_freq_factor", 1e-6, _MAX_FACTOR)
    if high <= low:
        parameters.fail("high_freq_factor", f"is {high:g}; it must be more than low_freq_factor {low:g}")
    original = parameters.integer("original_max_position_embeddings", 1, limits.MAX_CONTEXT, context)
    factors = []
    for index in range(dim // 2):
        turns = original / (2 * math.pi * base ** (2 * index / dim))  # within the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


def _longrope(config: Fields, parameters: Fields, base: float, dim: int, context: int) -> tuple[Rope, int]:
    """LongRoPE (Ding et al. 2024) within the original context.

    transformers switches to the long factors when a sequence outgrows the original context, and recomputes all its
    keys. Keys in pages cannot follow that, so the context ends where the short factors do.
    """
    source = config if config.get("original_max_position_embeddings") is not None else parameters
    original = source.integer("original_max_position_embeddings", 2, limits.MAX_CONTEXT, 4096)
    short = parameters.numbers("short_factor", 1 / _MAX_FACTOR, _MAX_FACTOR, dim // 2)
    long = parameters.numbers("long_factor", 1 / _MAX_FACTOR, _MAX_FACTOR, dim // 2)
    stretch = parameters.number("factor", 1 / _MAX_FACTOR, _MAX_FACTOR, context / original)
    suggested = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    attention_factor = parameters.number("attention_factor", 1e-6, _MAX_FACTOR, suggested)
    rope = Rope(base=base, dim=dim, factors=short, attention_factor=attention_factor)
    return rope, context if short == long else min(context, original)
