"""Small random models in memory, and a bench that feeds rows to a decoder and hands back every row's logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.formats.changed import change_weights, weight_matrices
from llm_os.drivers.formats.changed import weights_of as weights_of_image
from llm_os.drivers.formats.weights import Weights, WeightTensor


class MemoryWeights:
    """`Weights` over arrays. Matrices come as `kind`."""

    def __init__(self, arrays: dict[str, np.ndarray], kind: str = "F32") -> None:
        self._arrays = arrays
        self._kind = kind
        self._made: dict[str, WeightTensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> WeightTensor:
        if name not in self._made:
            self._made[name] = self._stored(name)
        return self._made[name]

    def _stored(self, name: str) -> WeightTensor:
        array = np.ascontiguousarray(self._arrays[name], np.float32)
        if array.ndim > 1 and self._kind != "F32":
            data = gguf.quants.quantize(array, gguf.GGMLQuantizationType[self._kind])
            return WeightTensor(name=name, shape=array.shape, kind=self._kind, data=data.view(np.uint8))
        data = array.view(np.uint8).reshape(-1, array.shape[-1] * 4)
        return WeightTensor(name=name, shape=array.shape, kind="F32", data=data)

    def names(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    def kept(self, name: str) -> str | None:
        return None

    def close(self) -> None:
        pass


def held(architecture: Architecture, weights: Weights, bits: str | None) -> Weights:
    """The weights as a pass has a device hold them: every matrix whose rows are whole groups, in so many bits."""
    if bits is None:
        return weights
    image: Any = SimpleNamespace(name="tiny", hyperparameters=architecture, weights=weights)
    kind = {"int8": "Q8_0", "int4": "Q4_1"}[bits]
    kinds = {name: kind for name, (_, columns) in weight_matrices(image).items() if columns % 32 == 0}
    return weights_of_image(change_weights(image, kept=kinds))


def random_weights(a: Architecture, seed: int = 0, kind: str = "F32") -> MemoryWeights:
    numbers = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return numbers.standard_normal((rows, columns)).astype(np.float32) * np.float32(1.5 / columns**0.5)

    def vector(size: int) -> np.ndarray:
        return 1 + 0.2 * numbers.standard_normal(size).astype(np.float32)

    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    arrays = {"token_embd.weight": matrix(a.vocab_size, a.hidden), "output_norm.weight": vector(a.hidden)}
    if not a.tied_embeddings:
        arrays["output.weight"] = matrix(a.vocab_size, a.hidden)
    for i in range(len(a.layers)):
        layer = {
            "attn_norm.weight": vector(a.hidden),
            "attn_q.weight": matrix(q, a.hidden),
            "attn_k.weight": matrix(kv, a.hidden),
            "attn_v.weight": matrix(kv, a.hidden),
            "attn_output.weight": matrix(a.hidden, q),
            "ffn_norm.weight": vector(a.hidden),
            "ffn_gate.weight": matrix(a.intermediate, a.hidden),
            "ffn_up.weight": matrix(a.intermediate, a.hidden),
            "ffn_down.weight": matrix(a.hidden, a.intermediate),
        }
        if a.qkv_bias:
            layer |= {"attn_q.bias": vector(q) - 1, "attn_k.bias": vector(kv) - 1, "attn_v.bias": vector(kv) - 1}
        if a.qk_norm:
            layer |= {"attn_q_norm.weight": vector(a.head_dim), "attn_k_norm.weight": vector(a.head_dim)}
        if a.post_norms:
            layer |= {"post_attention_norm.weight": vector(a.hidden), "post_ffw_norm.weight": vector(a.hidden)}
        arrays |= {f"blk.{i}.{name}": array for name, array in layer.items()}
    return MemoryWeights(arrays, kind)


class Bench:
    """A decoder and its pool. `feed` runs one batch of (tokens, position, pages) and returns the logits of all rows."""

    def __init__(self, decoder: Any, pool: Any, layers: int) -> None:
        self.decoder, self.pool = decoder, pool
        for layer in range(layers):
            pool.layer(layer).fill_(float("nan"))  # what a page held before must never be read

    def feed(self, *sequences: tuple[list[int], int, tuple[int, ...]], last: int = 0) -> list[Any]:
        """With `last`, only the logits of so many rows of the batch's end, as one."""
        import torch

        from llm_os.drivers.torch.attention import Stretch
        from llm_os.drivers.torch.pool import Layout

        stretches, row = [], 0
        for tokens, position, pages in sequences:
            layout = Layout(pages, self.pool.page_tokens, self.pool.slots)
            stretches.append(Stretch(row, len(tokens), position, layout))
            row += len(tokens)
        with torch.inference_mode():
            fed = [token for tokens, _, _ in sequences for token in tokens]
            wanted = list(range(len(fed)))[-last:]
            scores = self.decoder.scores(fed, stretches, self.pool, wanted)
            logits = torch.cat([each.logits.clone() for each in scores])
        if last:
            return [logits]
        return [logits[s.row : s.row + s.length] for s in stretches]


def torch_bench(
    a: Architecture, weights: Weights, mode: str = "exact", page_tokens: int = 16, pages: int = 64
) -> Bench:
    """Torch's decoder. `mode` is "exact" or "fast", and "+int8" or "+int4" perhaps."""
    import torch

    from llm_os.drivers.torch.arena import Arena
    from llm_os.drivers.torch.decoder import Decoder
    from llm_os.drivers.torch.linear import choose_format

    precision, _, bits = mode.partition("+")
    decoder = Decoder(a, held(a, weights, bits or None), choose_format(precision, torch.device("cpu")))
    pool = Arena(2 << 20, 0, torch.device("cpu")).open("m", a, page_tokens, pages)
    return Bench(decoder, pool, len(a.layers))


@pytest.fixture
def weights_of() -> Callable[..., Weights]:
    """weights_of(architecture, seed=0, kind="F32")"""
    return random_weights


@pytest.fixture
def bench() -> Callable[..., Bench]:
    """bench(architecture, weights, mode="exact", page_tokens=16, pages=64); modes are those of `torch_bench`"""
    return torch_bench


@pytest.fixture
def bench_of() -> type[Bench]:
    """bench_of(decoder, pool, layers)"""
    return Bench


@pytest.fixture
def hold() -> Callable[[Architecture, Weights, str | None], Weights]:
    """hold(architecture, weights, "int8")"""
    return held
