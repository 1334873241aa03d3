"""What a model costs on a device, in bytes, from its sizes alone. Mirrors what `decoder` and `pool` hold."""

from __future__ import annotations

from typing import NamedTuple

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.formats.weights import Weights
from llm_os.drivers.torch.attention import BLOCK, SPAN, TILE
from llm_os.drivers.torch.decoder import head_name, layer_matrices
from llm_os.drivers.torch.embedding import embedding_bytes
from llm_os.drivers.torch.linear import PART_BYTES, Format
from llm_os.drivers.torch.quantized import UNPACKED_BYTES
from llm_os.kernel.driver import Footprint


def measure(
    architecture: Architecture, weights: Weights, format: Format, batch_tokens: int, page_tokens: tuple[int, ...]
) -> Footprint:
    """Extents are the embedding, each layer, and the last norm with the head. Reads no matrix's contents."""
    a = architecture
    layers = [_matrices(a, weights, index) for index in range(len(a.layers))]
    name = head_name(a, weights, format)
    head = [] if name is None else [_Matrix([name], a.vocab_size, a.hidden)]
    largest = max(format.kept_bytes(weights, *each) for matrices in (*layers, head) for each in matrices)
    vectors = 4 * ((4 if a.post_norms else 2) * a.hidden + ((a.heads + a.kv_heads) * a.head_dim if a.qk_norm else 0))
    if a.qkv_bias:
        vectors += 4 * (a.heads + 2 * a.kv_heads) * a.head_dim
    return Footprint(
        extents=(
            embedding_bytes(weights, format),
            *(sum(format.nbytes(weights, *each) for each in matrices) + vectors for matrices in layers),
            sum(format.nbytes(weights, *each) for each in head) + 4 * a.hidden,
        ),
        kv_bytes_per_token=len(a.layers) * 2 * a.kv_heads * a.head_dim * 4,
        workspace=max(_forward(a, format, batch_tokens), 3 * PART_BYTES + largest),
        page_tokens=page_tokens,
    )


class _Matrix(NamedTuple):
    names: list[str]
    rows: int
    columns: int


def _matrices(a: Architecture, weights: Weights, index: int) -> list[_Matrix]:
    shapes = {
        "qkv": ((a.heads + 2 * a.kv_heads) * a.head_dim, a.hidden),
        "output": (a.hidden, a.heads * a.head_dim),
        "gate_up": (2 * a.intermediate, a.hidden),
        "down": (a.hidden, a.intermediate),
    }
    names = layer_matrices(weights, index)
    return [_Matrix(names[each], *shape) for each, shape in shapes.items()]


def _forward(a: Architecture, format: Format, batch_tokens: int) -> int:
    """An upper bound of the scratch of one batch: rows, one span of attention, one tile of logits, some rows of a
    matrix."""
    rows = batch_tokens + format.tile
    qkv = (a.heads + 2 * a.kv_heads) * a.head_dim
    per_row = 5 * a.hidden + max(5 * qkv, 7 * a.intermediate) + 2 * a.heads * a.head_dim
    span = 2 * a.kv_heads * SPAN * a.head_dim + a.heads * TILE * (3 * SPAN + 3 * (SPAN // BLOCK) * a.head_dim)
    masks = batch_tokens * SPAN
    logits = 2 * format.tile * a.vocab_size + 8 * a.vocab_size
    return 4 * (rows * per_row + span + masks + logits) + 3 * UNPACKED_BYTES
