"""What a model costs on a device, in bytes, from its sizes alone. Mirrors what `decoder` and `pool` hold."""

from __future__ import annotations

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.torch.attention import BLOCK, SPAN, TILE
from llm_os.drivers.torch.linear import PART_BYTES, Format
from llm_os.kernel.driver import Footprint


def measure(
    architecture: Architecture, embedding: int, format: Format, batch_tokens: int, page_tokens: tuple[int, ...]
) -> Footprint:
    """Extents are the embedding (`embedding` bytes), each layer, and the last norm with the head."""
    a = architecture
    shared = a.tied_embeddings and not format.embedding_in_file_type
    head = a.hidden * 4 + (0 if shared else format.nbytes(a.vocab_size, a.hidden))
    return Footprint(
        extents=(embedding, *(_layer(a, format) for _ in a.layers), head),
        kv_bytes_per_token=len(a.layers) * 2 * a.kv_heads * a.head_dim * 4,
        workspace=max(_forward(a, format, batch_tokens), 3 * PART_BYTES),
        page_tokens=page_tokens,
    )


def _layer(a: Architecture, format: Format) -> int:
    qkv = (a.heads + 2 * a.kv_heads) * a.head_dim
    matrices = (
        format.nbytes(qkv, a.hidden)
        + format.nbytes(a.hidden, a.heads * a.head_dim)
        + format.nbytes(2 * a.intermediate, a.hidden)
        + format.nbytes(a.hidden, a.intermediate)
    )
    norms = (4 if a.post_norms else 2) * a.hidden + ((a.heads + a.kv_heads) * a.head_dim if a.qk_norm else 0)
    return matrices + 4 * (norms + (qkv if a.qkv_bias else 0))


def _forward(a: Architecture, format: Format, batch_tokens: int) -> int:
    """An upper bound of the scratch of one batch: rows, one span of attention, one tile of logits."""
    rows = batch_tokens + format.tile
    qkv = (a.heads + 2 * a.kv_heads) * a.head_dim
    per_row = 5 * a.hidden + max(5 * qkv, 7 * a.intermediate) + 2 * a.heads * a.head_dim
    span = 2 * a.kv_heads * SPAN * a.head_dim + a.heads * TILE * (3 * SPAN + 3 * (SPAN // BLOCK) * a.head_dim)
    masks = batch_tokens * SPAN
    logits = 2 * format.tile * a.vocab_size + 8 * a.vocab_size
    return 4 * (rows * per_row + span + masks + logits)
