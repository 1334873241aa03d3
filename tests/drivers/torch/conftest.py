"""Two small architectures, and a driver in exact mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from llm_os.drivers.cpu import open_cpu
from llm_os.drivers.formats.architecture import Architecture, Layer, Rope
from llm_os.drivers.formats.weights import Weights
from llm_os.drivers.torch.driver import TorchDriver
from llm_os.kernel.config import Config

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
