"""One decoder for every supported family, driven by `Architecture`. Knows weights and rows; no files, no sampling.

rows of all sequences, one after another
  embedding -> { norm -> q, k, v -> rope -> pool, attention -> output -> + ; norm -> gate, up -> down -> + } -> norm
rows that sample -> head -> logits
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from llm_os.drivers.formats.architecture import Architecture, Rope
from llm_os.drivers.formats.weights import Weights
from llm_os.drivers.torch.attention import Plan, Stretch, attend
from llm_os.drivers.torch.embedding import EMBEDDING, open_embedding
from llm_os.drivers.torch.linear import Format, Linear
from llm_os.drivers.torch.pool import KvPool, Places
from llm_os.drivers.torch.rope import Rotation
from llm_os.drivers.torch.rows import ACTIVATIONS, rms_norm
from llm_os.drivers.torch.sampler import Scores, scores_of


class DecoderLayer:
    """One block of attention and feed-forward."""

    def __init__(self, architecture: Architecture, index: int, weights: Weights, format: Format) -> None:
        self._architecture = architecture
        self._index = index
        self.rope = architecture.layers[index].rope
        self.window = architecture.layers[index].window
        self._activation = ACTIVATIONS[architecture.activation]
        parts = _Parts(weights, f"blk.{index}.", format)
        matrices = layer_matrices(weights, index)
        self._qkv = parts.linear(matrices["qkv"])
        self._qkv_bias = parts.bias("attn_q", "attn_k", "attn_v") if architecture.qkv_bias else None
        self._output = parts.linear(matrices["output"])
        self._gate_up = parts.linear(matrices["gate_up"])
        self._down = parts.linear(matrices["down"])
        self._attention_norm = parts.vector("attn_norm")
        self._feed_forward_norm = parts.vector("ffn_norm")
        self._qk_norm = parts.per_head(architecture) if architecture.qk_norm else None
        self._post_attention_norm = parts.vector("post_attention_norm") if architecture.post_norms else None
        self._post_feed_forward_norm = parts.vector("post_ffw_norm") if architecture.post_norms else None
        self.nbytes = parts.nbytes

    def forward(self, x: Tensor, rotation: Rotation, plan: Plan, pool: KvPool, places: Places) -> Tensor:
        """`x` [n, hidden] through this layer; writes the rows' keys and values at `places`."""
        eps = self._architecture.norm_eps
        attention = self._attention(rms_norm(x, self._attention_norm, eps), rotation, plan, pool, places)
        if self._post_attention_norm is not None:
            attention = rms_norm(attention, self._post_attention_norm, eps)
        x = x + attention
        gate, up = self._gate_up(rms_norm(x, self._feed_forward_norm, eps)).chunk(2, dim=-1)
        y = self._down(self._activation(gate) * up)
        if self._post_feed_forward_norm is not None:
            y = rms_norm(y, self._post_feed_forward_norm, eps)
        return x + y

    def _attention(self, x: Tensor, rotation: Rotation, plan: Plan, pool: KvPool, places: Places) -> Tensor:
        a = self._architecture
        qkv = self._qkv(x)
        if self._qkv_bias is not None:
            qkv = qkv + self._qkv_bias
        heads = qkv.view(len(x), -1, a.head_dim)
        qk, v = heads[:, : a.heads + a.kv_heads], heads[:, a.heads + a.kv_heads :]
        if self._qk_norm is not None:
            qk = rms_norm(qk, self._qk_norm, a.norm_eps)
        qk = rotation(qk)
        q, k = qk[:, : a.heads], qk[:, a.heads :]
        pool.write(self._index, k, v, places)
        return self._output(attend(plan, pool, self._index, q, a.attention_scale))


class Decoder:
    """A model's weights on the device, and the forward pass."""

    def __init__(self, architecture: Architecture, weights: Weights, format: Format) -> None:
        """Load layer by layer: besides what stays, a part of one matrix is held at a time. Raises FormatError."""
        self._architecture = architecture
        self._format = format
        self._embedding = open_embedding(weights, format)
        self._layers = [DecoderLayer(architecture, i, weights, format) for i in range(len(architecture.layers))]
        parts = _Parts(weights, "", format)
        self._norm = parts.vector("output_norm")
        head = head_name(architecture, weights, format)
        self._head = parts.linear([head]) if head is not None else self._embedding.head(format)
        self.nbytes = self._embedding.nbytes + sum(layer.nbytes for layer in self._layers) + parts.nbytes

    def _forward(self, tokens: list[int], stretches: list[Stretch], pool: KvPool) -> Tensor:
        """Feed `tokens`; returns [n, hidden] after the last norm."""
        device = self._format.device
        positions = [stretch.position + i for stretch in stretches for i in range(stretch.length)]
        pairs = [pair for stretch in stretches for pair in stretch.layout.places(stretch.position, stretch.end)]
        frames, offsets = torch.tensor(pairs, device=device).unbind(1)
        where = torch.tensor(positions, device=device)
        rotations: dict[Rope, Rotation] = {}
        plans: dict[int | None, Plan] = {}
        x = self._embedding.rows(tokens) * self._architecture.embedding_scale
        for layer in self._layers:
            if layer.rope not in rotations:
                rotations[layer.rope] = Rotation(layer.rope, where)
            if layer.window not in plans:
                plans[layer.window] = Plan(stretches, layer.window, device)
            x = layer.forward(x, rotations[layer.rope], plans[layer.window], pool, (frames, offsets))
        return rms_norm(x, self._norm, self._architecture.norm_eps)

    def scores(self, tokens: list[int], stretches: list[Stretch], pool: KvPool, rows: list[int]) -> Iterator[Scores]:
        """Feed `tokens`, the rows of all `stretches` in order, and write their keys and values to `pool`.

        Yields the scores over the vocabulary of `rows`, up to a tile at a time."""
        hidden, tile = self._forward(tokens, stretches, pool), self._format.tile
        for start in range(0, len(rows), tile):
            yield scores_of(self._head(hidden[torch.tensor(rows[start : start + tile], device=hidden.device)]))


def layer_matrices(weights: Weights, index: int) -> dict[str, list[str]]:
    """The tensors that each matrix of a layer is made of: those that multiply the same rows are one."""
    names = {
        "qkv": ["attn_qkv"] if f"blk.{index}.attn_qkv.weight" in weights else ["attn_q", "attn_k", "attn_v"],
        "output": ["attn_output"],
        "gate_up": ["ffn_gate", "ffn_up"] if f"blk.{index}.ffn_gate.weight" in weights else ["ffn_up"],
        "down": ["ffn_down"],
    }
    return {matrix: [f"blk.{index}.{name}.weight" for name in parts] for matrix, parts in names.items()}


def head_name(architecture: Architecture, weights: Weights, format: Format) -> str | None:
    """The tensor that the head is made of; None where it shares the embedding's matrix on the device."""
    if not architecture.tied_embeddings or weights.kept("output.weight") is not None:
        return "output.weight"
    return EMBEDDING if format.embedding_in_file_type else None


class _Parts:
    """The tensors under one prefix, taken to the device, and the bytes they came to."""

    def __init__(self, weights: Weights, prefix: str, format: Format) -> None:
        self._weights = weights
        self._prefix = prefix
        self._format = format
        self.nbytes = 0

    def linear(self, names: list[str]) -> Linear:
        """One product for several weights that multiply the same rows. Their names are whole."""
        linear = self._format.linear(self._weights, names)
        self.nbytes += linear.nbytes
        return linear

    def vector(self, name: str) -> Tensor:
        return self._vector([f"{self._prefix}{name}.weight"])

    def per_head(self, architecture: Architecture) -> Tensor:
        """The norms of queries and keys, [heads + kv_heads, head_dim], so that both are one product."""
        names = ["attn_q_norm"] * architecture.heads + ["attn_k_norm"] * architecture.kv_heads
        return self._vector([f"{self._prefix}{name}.weight" for name in names]).view(len(names), -1)

    def bias(self, *names: str) -> Tensor:
        return self._vector([f"{self._prefix}{name}.bias" for name in names])

    def _vector(self, names: list[str]) -> Tensor:
        arrays = [self._weights[name].float32().reshape(-1) for name in names]
        vector = torch.from_numpy(np.concatenate(arrays)).to(self._format.device)
        self.nbytes += vector.nbytes
        return vector
