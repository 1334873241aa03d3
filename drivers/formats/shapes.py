"""Which tensors an architecture needs, and in which shapes; checks a file against them. Reads no values."""

from __future__ import annotations

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.formats.mapped import shown
from llm_os.kernel.errors import FormatError, Unsupported

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(architecture: Architecture) -> Shapes:
    """Every tensor of the decoder by GGUF's name, with its shape in torch's order."""
    a = architecture
    shapes: Shapes = {"token_embd.weight": (a.vocab_size, a.hidden), "output_norm.weight": (a.hidden,)}
    if not a.tied_embeddings:
        shapes["output.weight"] = (a.vocab_size, a.hidden)
    for index in range(len(a.layers)):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in _layer_shapes(a).items()}
    return shapes


def _layer_shapes(a: Architecture) -> Shapes:
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes: Shapes = {
        "attn_norm.weight": (a.hidden,),
        "attn_output.weight": (a.hidden, queries),
        "ffn_norm.weight": (a.hidden,),
        "ffn_down.weight": (a.hidden, a.intermediate),
    }
    if a.family == "phi3":  # q, k, v in one; gate and up in one
        shapes["attn_qkv.weight"] = (queries + 2 * keys, a.hidden)
        shapes["ffn_up.weight"] = (2 * a.intermediate, a.hidden)
    else:
        shapes["attn_q.weight"] = (queries, a.hidden)
        shapes["attn_k.weight"] = shapes["attn_v.weight"] = (keys, a.hidden)
        shapes["ffn_gate.weight"] = shapes["ffn_up.weight"] = (a.intermediate, a.hidden)
    if a.qkv_bias:
        shapes["attn_q.bias"] = (queries,)
        shapes["attn_k.bias"] = shapes["attn_v.bias"] = (keys,)
    if a.qk_norm:
        shapes["attn_q_norm.weight"] = shapes["attn_k_norm.weight"] = (a.head_dim,)
    if a.post_norms:
        shapes["post_attention_norm.weight"] = shapes["post_ffw_norm.weight"] = (a.hidden,)
    return shapes


def check_tensors(found: Shapes, architecture: Architecture, file: str, ignored: frozenset[str]) -> None:
    """`found` are the file's tensors. Raises FormatError for a missing one or a wrong shape, Unsupported for one that
    nobody would read: one that is neither needed nor in `ignored` means that the model computes something else.
    """
    needed = tensor_shapes(architecture)
    for name, expected in needed.items():
        if name not in found:
            raise FormatError(f"{file}: tensor {name} is missing; expected with shape {_text(expected)}")
        if found[name] != expected:
            raise FormatError(f"{file}: tensor {name} has shape {_text(found[name])}; expected {_text(expected)}")
    for name in found:
        if name not in needed and name not in ignored:
            raise Unsupported(
                f"{file}: tensor {shown(name)} has no place in a model of the {architecture.family} family as this "
                "version runs it"
            )


def _text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
