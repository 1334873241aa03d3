"""What a model costs as native code, in bytes, from its sizes alone. Mirrors what `decoder` holds."""

from __future__ import annotations

from itertools import chain

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.formats.changed import outline
from llm_os.drivers.formats.quants import held_row_bytes
from llm_os.drivers.formats.weights import Weights
from llm_os.drivers.native.decoder import HEAD_ROWS, MAX_ROWS
from llm_os.drivers.native.groups import GROUP
from llm_os.drivers.native.machine import LANES
from llm_os.drivers.native.packed import PART_VALUES, head_of, kind_of, packed_bytes, shares_embedding
from llm_os.drivers.native.program import program_bytes
from llm_os.drivers.torch.decoder import layer_matrices
from llm_os.drivers.torch.embedding import EMBEDDING
from llm_os.kernel.driver import Footprint

_OPERATIONS = 16  # of a layer at most: a matrix of several types takes one for each
PAGE_TOKENS = tuple(range(LANES, 8 * LANES + 1, LANES))  # keys lie in blocks of 16 tokens


def measure_native(a: Architecture, weights: Weights, batch_tokens: int, threads: int) -> Footprint:
    """What it takes, with so many threads. Extents are the embedding, each layer, and the last norm with the head.
    Reads no matrix's contents."""
    vectors = 4 * ((4 if a.post_norms else 2) * a.hidden + (2 * a.head_dim if a.qk_norm else 0))
    if a.qkv_bias:
        vectors += 4 * (a.heads + 2 * a.kv_heads) * a.head_dim
    embedding = 0 if shares_embedding(a, weights) else weights[EMBEDDING].data.nbytes
    layers = [layer_matrices(weights, index).values() for index in range(len(a.layers))]
    head = head_of(a)
    largest = max(_made(weights, name) for name in chain(*chain(*layers)))
    made = max(largest, _made(weights, head)) + (threads - 1) * largest
    angles = sum(4 * rope.dim * a.context_length for rope in {layer.rope for layer in a.layers})
    return Footprint(
        extents=(
            embedding,
            *(sum(_packed(weights, name) for names in layer for name in names) + vectors for layer in layers),
            _packed(weights, head) + 4 * a.hidden,
        ),
        kv_bytes_per_token=len(a.layers) * 2 * a.kv_heads * a.head_dim * 2,
        workspace=max(_forward(a, batch_tokens, threads) + angles, max(15, threads) * 17 * PART_VALUES + made),
        page_tokens=PAGE_TOKENS,
    )


def _packed(weights: Weights, name: str) -> int:
    kind, (rows, columns) = outline(weights, name)
    return packed_bytes(kind_of(kind), rows, columns)


def _made(weights: Weights, name: str) -> int:
    """What there is of a matrix besides, while it is packed: as a pass made it. 0 where the file has it."""
    kind = weights.kept(name)
    if kind is None:
        return 0
    _, (rows, columns) = outline(weights, name)
    return rows * held_row_bytes(kind, columns)


def _forward(a: Architecture, batch_tokens: int, threads: int) -> int:
    """The scratch of one batch, its programs, and what the sampler has of one part of its logits."""
    rows = min(MAX_ROWS, 1 << (max(HEAD_ROWS, batch_tokens) - 1).bit_length())
    inner = a.heads * a.head_dim
    widest = max(a.hidden, inner, a.intermediate)
    floats = 4 * a.hidden + (a.heads + 2 * a.kv_heads) * a.head_dim + inner + 2 * a.intermediate + 3 * a.head_dim
    integers = widest + 12 * widest // GROUP
    vocab = -(-a.vocab_size // LANES) * LANES
    programs = (_OPERATIONS * len(a.layers) + 5) * program_bytes(threads)
    return programs + rows * (4 * floats + integers + 64) + HEAD_ROWS * 4 * (vocab + a.hidden) + 8 * 8 * a.vocab_size
