"""Small random models in memory, and a bench that feeds rows to a decoder and hands back every row's logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor

from llm_os.drivers.cpu import open_cpu
from llm_os.drivers.formats.architecture import Architecture, Layer, Rope
from llm_os.drivers.formats.changed import change_weights, weight_matrices
from llm_os.drivers.formats.changed import weights_of as weights_of_image
from llm_os.drivers.formats.weights import Weights, WeightTensor
from llm_os.drivers.torch.arena import Arena
from llm_os.drivers.torch.attention import Stretch
from llm_os.drivers.torch.decoder import Decoder
from llm_os.drivers.torch.driver import TorchDriver
from llm_os.drivers.torch.linear import Format, choose_format
from llm_os.drivers.torch.pool import Layout
from llm_os.kernel.config import Config


class MemoryWeights:
    """`Weights` over arrays."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> WeightTensor:
        array = np.ascontiguousarray(self._arrays[name], np.float32)
        data = array.view(np.uint8).reshape(-1, array.shape[-1] * 4)
        return WeightTensor(name=name, shape=array.shape, kind="F32", data=data)

    def names(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    def kept(self, name: str) -> str | None:
        return None

    def close(self) -> None:
        pass


def mode_of(mode: str) -> tuple[Format, str | None]:
    """ "exact", "fast", or "emulated" (fast without the processor's integers), and "+int8" or "+int4" perhaps."""
    precision, _, bits = mode.partition("+")
    format = choose_format("fast" if precision == "emulated" else precision, torch.device("cpu"))
    return structs.replace(format, integers="emulated") if precision == "emulated" else format, bits or None


def held(architecture: Architecture, weights: Weights, bits: str | None) -> Weights:
    """The weights as a pass has them held: every matrix in the smallest type of so many bits that fits its rows."""
    if bits is None:
        return weights
    image: Any = SimpleNamespace(name="tiny", hyperparameters=architecture, weights=weights)
    kinds = {}
    for name, (_, columns) in weight_matrices(image).items():
        wide = "INT8_ROW_H64" if columns % 64 == 0 else "INT8_ROW"
        kinds[name] = "Q4_1" if bits == "int4" and columns % 32 == 0 else wide
    return weights_of_image(change_weights(image, kept=kinds))


class Bench:
    """A decoder and its pool. `feed` runs one batch of (tokens, position, pages) and returns the logits of all rows."""

    def __init__(self, architecture: Architecture, weights: Weights, mode: str, page_tokens: int, pages: int):
        a = architecture
        format, bits = mode_of(mode)
        self.decoder = Decoder(a, held(a, weights, bits), format)
        self.pool = Arena(2 << 20, 0, torch.device("cpu")).open("m", a, page_tokens, pages)
        for layer in range(len(a.layers)):
            self.pool.layer(layer).fill_(torch.nan)  # what a page held before must never be read

    def feed(self, *sequences: tuple[list[int], int, tuple[int, ...]]) -> list[Tensor]:
        stretches, row = [], 0
        for tokens, position, pages in sequences:
            layout = Layout(pages, self.pool.page_tokens, self.pool.slots)
            stretches.append(Stretch(row, len(tokens), position, layout))
            row += len(tokens)
        with torch.inference_mode():
            hidden = self.decoder.forward([t for tokens, _, _ in sequences for t in tokens], stretches, self.pool)
            logits = torch.cat([scores.logits.clone() for scores in self.decoder.scores(hidden)])
        return [logits[s.row : s.row + s.length] for s in stretches]


def random_weights(a: Architecture, seed: int = 0) -> MemoryWeights:
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
    return MemoryWeights(arrays)


ODD = Architecture(  # no size is a multiple of a vector or a tile
    family="gemma3",
    vocab_size=103,
    hidden=72,
    intermediate=101,
    heads=6,
    kv_heads=2,
    head_dim=18,
    context_length=4096,
    norm_eps=1e-6,
    layers=(
        Layer(rope=Rope(base=10000.0, dim=18), window=37),
        Layer(rope=Rope(base=1000000.0, dim=10, factors=(1.0, 1.5, 2.0, 4.0, 8.0), attention_factor=1.1)),
    ),
    activation="gelu_tanh",
    qk_norm=True,
    qkv_bias=True,
    post_norms=True,
    embedding_scale=72**0.5,
    attention_scale=0.2,
)
EVEN = Architecture(  # sizes as real models have them; goes through the packed format
    family="llama",
    vocab_size=192,
    hidden=128,
    intermediate=320,
    heads=4,
    kv_heads=2,
    head_dim=32,
    context_length=4096,
    norm_eps=1e-5,
    layers=(Layer(rope=Rope(base=10000.0, dim=32)),) * 2,
    attention_scale=32**-0.5,
    tied_embeddings=True,
)
ARCHITECTURES = {"odd": ODD, "even": EVEN}


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: Any) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture
def driver() -> Iterator[TorchDriver]:
    driver = open_cpu(Config(precision="exact"))
    yield driver
    driver.close()


@pytest.fixture
def image(architecture: Architecture, weights_of: Callable[[Architecture], Weights]) -> Any:
    return SimpleNamespace(name="tiny", hyperparameters=architecture, weights=weights_of(architecture))


@pytest.fixture
def weights_of() -> Callable[[Architecture], Weights]:
    return random_weights


@pytest.fixture
def bench() -> Callable[..., Bench]:
    """bench(architecture, weights, mode="exact", page_tokens=16, pages=64); modes are those of `mode_of`"""

    def build(a: Architecture, weights: Weights, mode: str = "exact", page_tokens: int = 16, pages: int = 64) -> Bench:
        return Bench(a, weights, mode, page_tokens, pages)

    return build


@pytest.fixture
def hold() -> Callable[[Architecture, Weights, str | None], Weights]:
    """hold(architecture, weights, "int8")"""
    return held
