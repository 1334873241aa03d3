"""The native decoder against the exact one on the same weights, for every family; and the same bits in any company."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs

from llm_os.drivers.cpu import open_cpu
from llm_os.drivers.formats.architecture import Architecture, Layer, Rope
from llm_os.drivers.formats.changed import change_weights
from llm_os.drivers.formats.weights import Weights, WeightTensor
from llm_os.drivers.native import footprint
from llm_os.drivers.native.decoder import NativeDecoder
from llm_os.drivers.native.footprint import measure_native
from llm_os.drivers.native.packed import fits
from llm_os.drivers.native.program import Program
from llm_os.drivers.native.threads import Team
from llm_os.drivers.torch import linear
from llm_os.drivers.torch.arena import Arena
from llm_os.drivers.torch.footprint import measure
from llm_os.drivers.torch.linear import choose_format
from llm_os.drivers.torch.pool import KvPool
from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, Placement, RowError, Sample, Sampled, Sequence
from llm_os.kernel.errors import FormatError

PLAIN = Rope(base=10000.0, dim=32)
LLAMA = Architecture(
    family="llama",
    vocab_size=203,  # no whole number of blocks
    hidden=128,
    intermediate=352,
    heads=4,
    kv_heads=2,
    head_dim=32,
    context_length=4096,
    norm_eps=1e-5,
    layers=(Layer(rope=PLAIN),) * 2,
    attention_scale=32**-0.5,
)
LLAMA3 = Rope(base=500000.0, dim=32, factors=tuple(np.linspace(1, 8, 16).tolist()))
LONGROPE = Rope(base=10000.0, dim=32, factors=tuple(np.linspace(1, 4, 16).tolist()), attention_factor=1.19)
FAMILIES = {
    "llama": LLAMA,
    "llama3, tied": structs.replace(LLAMA, tied_embeddings=True, layers=(Layer(rope=LLAMA3),) * 2),
    "mistral": structs.replace(LLAMA, family="mistral", heads=8, layers=(Layer(rope=PLAIN, window=21),) * 2),
    "qwen2": structs.replace(LLAMA, family="qwen2", qkv_bias=True, kv_heads=4),
    "qwen3": structs.replace(
        LLAMA, family="qwen3", qk_norm=True, heads=3, kv_heads=1, head_dim=64, attention_scale=0.125
    ),
    "gemma3": structs.replace(
        LLAMA,
        family="gemma3",
        layers=(Layer(rope=PLAIN, window=21), Layer(rope=Rope(base=1e6, dim=32, factors=(8.0,) * 16))),
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        embedding_scale=128**0.5,
        attention_scale=0.2,
        tied_embeddings=True,
    ),
    "phi3": structs.replace(LLAMA, family="phi3", head_dim=96, heads=2, kv_heads=2, layers=(Layer(rope=LONGROPE),) * 2),
}
TYPES = ["F32", "Q8_0", "Q4_1"]


@pytest.fixture(scope="module")
def team():
    team = Team(2, "test")
    yield team
    team.close()


@pytest.fixture
def native(bench_of, team) -> Callable[..., Any]:
    """native(architecture, weights, page_tokens=16, pages=64): a bench of the native decoder."""

    def build(a: Architecture, weights: Weights, page_tokens: int = 16, pages: int = 64, team: Team = team) -> Any:
        assert fits(a)
        pool = Arena(2 << 20, 0, torch.device("cpu")).open("m", a, page_tokens, pages, torch.float16)
        return bench_of(NativeDecoder(a, weights, team), pool, len(a.layers))

    return build


@pytest.fixture(params=FAMILIES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return FAMILIES[request.param]


def tokens_of(a: Architecture, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, a.vocab_size, length).tolist()


def distance(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each row's logits, relative to how far they spread."""
    return (found - expected).norm(dim=-1) / (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)


def in_steps(x: torch.Tensor) -> torch.Tensor:
    """Rows as native code rounds them: each 32 values to 256 steps from the least to the greatest."""
    groups = x.reshape(len(x), -1, 32)
    least = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - least) / 255
    return (torch.round((groups - least) / step) * step + least).reshape(x.shape)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact decoder rounds what native code rounds: rows before every product, and keys and values to float16."""
    by_tiles, write = linear.by_tiles, KvPool.write
    monkeypatch.setattr(linear, "by_tiles", lambda f, x, weight, tile: by_tiles(f, in_steps(x), weight, tile))

    def write_halves(pool: KvPool, layer: int, keys: torch.Tensor, values: torch.Tensor, places: Any) -> None:
        write(pool, layer, keys.half().float(), values.half().float(), places)

    monkeypatch.setattr(KvPool, "write", write_halves)


def distances(a: Architecture, exact: Any, quick: Any) -> torch.Tensor:
    """Of two benches, over the rows of a prompt, a step, and a mixed batch."""
    first, second = tokens_of(a, 90), tokens_of(a, 41, 1)
    pages, others = (3, 9, 4, 5, 6, 7), (30, 20, 21)
    found = []
    for fed in (
        [(first[:70], 0, pages)],
        [(first[70:71], 70, pages)],
        [(second, 0, others), (first[71:], 71, pages)],
    ):
        found += list(map(distance, quick.feed(*fed), exact.feed(*fed)))
    return torch.cat(found)


def test_logits_are_near_those_of_the_exact_decoder(architecture, weights_of, bench, native):
    """Random layers make any error larger; those of a model that has been trained do not."""
    weights = weights_of(architecture)
    found = distances(architecture, bench(architecture, weights), native(architecture, weights))
    assert found.mean() < 0.06


@pytest.mark.parametrize("layer", [0, 1])
def test_it_is_rounding_that_differs_from_the_exact_decoder_and_nothing_else(
    architecture, weights_of, bench, native, rounding, layer
):
    """One layer, or what is rounded up here and down there would make later layers differ."""
    a = structs.replace(architecture, layers=architecture.layers[layer:][:1])
    weights = weights_of(a, kind="Q8_0" if layer else "Q4_1")
    found = distances(a, bench(a, weights), native(a, weights))
    assert found.quantile(0.25) < 1e-5  # rows in which no rounding fell to the other side
    assert found.max() < 0.03


def shuffled_tables(chance: random.Random, lengths: list[int], page_tokens: int, pages: int) -> list[tuple[int, ...]]:
    free = list(range(pages))
    chance.shuffle(free)
    tables = []
    for length in lengths:
        count = -(-length // page_tokens)
        tables.append(tuple(free[:count]))
        free = free[count:]
    return tables


def in_company(bench: Any, chance: random.Random, prompts: list[list[int]], tables: list[tuple[int, ...]]) -> list[Any]:
    """Every row's logits, from batches of some of the sequences, cut at random and in a random order."""
    done = [0] * len(prompts)
    rows: list[list[Any]] = [[] for _ in prompts]
    while waiting := [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]:
        chosen = chance.sample(waiting, chance.randint(1, len(waiting)))
        batch = []
        for i in chosen:
            length = min(chance.choice([1, 1, 2, 15, 16, 17, 33, 200]), len(prompts[i]) - done[i])
            batch.append((prompts[i][done[i] : done[i] + length], done[i], tables[i]))
            done[i] += length
        for i, logits in zip(chosen, bench.feed(*batch), strict=True):
            rows[i].append(logits)
    return [torch.cat(pieces) for pieces in rows]


@pytest.mark.parametrize("page_tokens", [16, 48])
def test_a_row_is_the_same_bits_alone_and_in_any_company(architecture, weights_of, native, page_tokens):
    chance = random.Random(page_tokens)
    weights = weights_of(architecture, kind="Q4_1" if page_tokens == 16 else "Q8_0")
    bench = native(architecture, weights, page_tokens, 200)
    lengths = [1, 2, 17, 40, chance.randint(100, 140), chance.randint(250, 300)]
    prompts = [tokens_of(architecture, length, i) for i, length in enumerate(lengths)]
    apart = [bench.feed((prompt, 0, tuple(range(40))))[0] for prompt in prompts]
    together = in_company(bench, chance, prompts, shuffled_tables(chance, lengths, page_tokens, 200))
    for reference, logits in zip(apart, together, strict=True):
        assert torch.equal(reference, logits)


def test_thirty_two_sequences_decode_together_as_each_alone(architecture, weights_of, native):
    bench = native(architecture, weights_of(architecture, kind="Q4_1"), 16, 33 * 3)
    prompts = [tokens_of(architecture, 3 + i, i) for i in range(32)]
    tables = [tuple(range(i * 3, i * 3 + 3)) for i in range(32)]
    bench.feed(*[(prompt[:-1], 0, table) for prompt, table in zip(prompts, tables, strict=True)])
    batch = [([prompt[-1]], len(prompt) - 1, table) for prompt, table in zip(prompts, tables, strict=True)]
    together = bench.feed(*batch)
    for prompt, logits in zip(prompts, together, strict=True):
        assert torch.equal(logits[0], bench.feed((prompt, 0, (96, 97, 98)))[0][-1])


def test_recomputing_a_long_sequence_gives_what_decoding_gave(weights_of, native):
    bench = native(LLAMA, weights_of(LLAMA), 32, 80)
    tokens = tokens_of(LLAMA, 2100)  # past the angles that are made at first
    first, second = tuple(range(40)), tuple(range(79, 39, -1))
    bench.feed((tokens[:1015], 0, first))
    decoded = [bench.feed(([token], 1015 + i, first))[0] for i, token in enumerate(tokens[1015:1030])]
    assert torch.equal(torch.cat(decoded), bench.feed((tokens[:1100], 0, second))[0][1015:1030])
    again = native(LLAMA, weights_of(LLAMA), 32, 80)
    whole = again.feed((tokens, 0, tuple(range(66))))[0]
    pieces = [bench.feed((tokens[at : at + 700], at, tuple(range(66))))[0] for at in range(0, 2100, 700)]
    assert torch.equal(torch.cat(pieces), whole)


def test_the_number_of_threads_changes_nothing(weights_of, native):
    a, weights = FAMILIES["gemma3"], weights_of(FAMILIES["gemma3"])
    found = []
    for threads in (1, 2, 3):
        team = Team(threads, "test")
        found.append(native(a, weights, team=team).feed((tokens_of(a, 75), 0, (1, 2, 3, 4, 5)), ([4], 0, (9,))))
        team.close()
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_neighbour_full_of_nan_is_not_noticed(architecture, weights_of, native):
    bench = native(architecture, weights_of(architecture), 16, 20)
    tokens = [5, 6, 7, 8, 9]
    (reference,) = bench.feed((tokens, 0, (3, 4)))
    bench.pool.page(5).fill_(torch.nan)
    sick, healthy = bench.feed(([1], 16, (5, 6)), (tokens, 0, (7, 8)))
    assert sick.isnan().all()
    assert torch.equal(healthy, reference)


@pytest.mark.parametrize("kind", TYPES)
def test_the_footprint_is_what_the_decoder_holds(architecture, weights_of, native, kind):
    weights = weights_of(architecture, kind=kind)
    claimed = measure_native(architecture, weights, 64, 2)
    decoder = native(architecture, weights).decoder
    arrays = [decoder._embedding, decoder._head, decoder._norm, *decoder._layers]
    assert [each.nbytes for each in decoder._layers] == list(claimed.extents[1:-1])
    assert sum(claimed.extents) == decoder.nbytes == sum(each.nbytes for each in arrays)
    assert set(claimed.page_tokens) == {16, 32, 48, 64, 80, 96, 112, 128}
    kv = len(architecture.layers) * 2 * architecture.kv_heads * architecture.head_dim * 2
    assert claimed.kv_bytes_per_token == kv


def bytes_of(held: Any) -> int:
    """Of all arrays in it."""
    if isinstance(held, np.ndarray):
        return held.nbytes
    if isinstance(held, Program):
        held = vars(held)
    if isinstance(held, dict):
        held = tuple(held.values())
    return sum(map(bytes_of, held)) if isinstance(held, tuple) else 0


@pytest.mark.parametrize("rows", [64, 2048])
def test_what_a_batch_takes_is_within_the_claim(architecture, weights_of, native, rows):
    """Without the least claim, for loading, which would cover any batch of a model so small."""
    a = structs.replace(architecture, layers=architecture.layers[-1:])
    weights = weights_of(a)
    bench = native(a, weights, 64, rows // 64)
    threads = bench.decoder._team.count
    claim = footprint._forward(a, rows, threads)
    assert measure_native(a, weights, 100 * rows, threads).workspace > claim
    tokens = tokens_of(a, 64)
    batch = [(tokens, 0, (i,)) for i in range(rows // 64)]
    bench.feed(*batch, last=32)
    buffers = bytes_of(vars(bench.decoder))
    tracemalloc.start()
    bench.feed(*batch, last=32)
    _, passing = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert claim / 3 < buffers + passing <= claim


@pytest.mark.parametrize("kind", TYPES)
def test_what_a_load_takes_besides_is_within_the_claim(weights_of, team, kind):
    a = structs.replace(LLAMA, hidden=512, intermediate=4096, vocab_size=16384, layers=LLAMA.layers[:1] * 2)
    weights = weights_of(a, kind=kind)
    assert all(weights[name].shape for name in weights.names())  # they are made, as those of a file are
    claim = measure_native(a, weights, 16, team.count)
    tracemalloc.start()
    decoder = NativeDecoder(a, weights, team)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - decoder.nbytes <= claim.workspace


def image_of(a: Architecture, weights: Weights) -> Any:
    return SimpleNamespace(name="tiny", hyperparameters=a, weights=weights)


def answer(driver: Any, image: Any, tokens: list[int], page_tokens: int = 16) -> Sampled | RowError:
    driver.load("m", image, Placement(extents=(), page_tokens=page_tokens, pages=20)).result()
    wish = Sample(uniform=0.0, logprobs=5)
    pages = tuple(range(3, 3 + -(-len(tokens) // page_tokens)))
    sequence = Sequence(pid=1, salt=0, tokens=tuple(tokens), position=0, pages=pages, sample=wish)
    (row,) = driver.run(Batch(model="m", sequences=(sequence,))).result()
    driver.unload("m").result()
    driver.release("m").result()
    return row


@pytest.fixture
def driver():
    driver = open_cpu(Config(threads=2))
    yield driver
    driver.close()


ODD_SIZES = {
    "head": {"head_dim": 24, "layers": (Layer(rope=Rope(base=1e4, dim=24)),)},
    "hidden": {"hidden": 120},
    "intermediate": {"intermediate": 340},
    "rope": {"layers": (Layer(rope=Rope(base=1e4, dim=16)),)},
    "rows": {
        "hidden": 96,
        "intermediate": 320,
        "head_dim": 16,
        "heads": 2,
        "kv_heads": 1,
        "layers": (Layer(rope=Rope(base=1e4, dim=16)),),
    },
}


@pytest.mark.parametrize("sizes", ODD_SIZES.values(), ids=ODD_SIZES)
def test_a_model_that_does_not_fit_is_computed_by_torch(driver, weights_of, sizes):
    a = structs.replace(LLAMA, **sizes)
    image = image_of(a, weights_of(a))
    assert not fits(a)
    expected = measure(a, image.weights, choose_format("fast", torch.device("cpu")), 64, tuple(range(8, 33)))
    assert driver.footprint(image, 64) == expected
    exact = open_cpu(Config(precision="exact", threads=2))
    assert answer(driver, image, tokens_of(a, 40)) == answer(exact, image, tokens_of(a, 40))
    exact.close()


def test_the_driver_computes_a_model_that_fits_as_native_code(driver, weights_of, native):
    image = image_of(LLAMA, weights_of(LLAMA, kind="Q4_1"))
    assert driver.footprint(image, 64) == measure_native(LLAMA, image.weights, 64, driver._team.count)
    tokens = tokens_of(LLAMA, 40)
    (logits,) = native(LLAMA, image.weights).feed((tokens, 0, (1, 2, 3)))
    row = answer(driver, image, tokens)
    assert isinstance(row, Sampled)
    assert row.token == int(logits[-1].argmax())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_a_model_that_a_pass_changed_is_computed_as_the_pass_has_it(driver, weights_of, hold, bench, bits, tied):
    a = structs.replace(LLAMA, tied_embeddings=tied)
    weights = weights_of(a)
    image = image_of(a, hold(a, weights, bits))
    footprint = driver.footprint(image, 64)
    tokens = tokens_of(a, 60)
    (expected,) = bench(a, weights, f"exact+{bits}").feed((tokens, 0, (1, 2, 3, 4)))
    row = answer(driver, image, tokens)
    assert isinstance(row, Sampled)
    spread = float(expected[-1].std())
    assert abs(row.logprob - float(expected[-1].log_softmax(-1)[row.token])) < 0.1 * spread
    driver.load("m", image, Placement(extents=(), page_tokens=16, pages=20)).result()
    assert driver.memory().weights == sum(footprint.extents)


def test_the_footprint_does_not_do_the_work_of_a_pass(driver, weights_of, hold, monkeypatch):
    image = image_of(LLAMA, hold(LLAMA, weights_of(LLAMA), "int4"))

    def never(tensor: Any, kind: str) -> Any:
        raise AssertionError("quantized before it was needed")

    monkeypatch.setattr(WeightTensor, "quantized", never)
    assert len(driver.footprint(image, 64).extents) == 2 + len(LLAMA.layers)


def test_every_thread_that_packs_may_hold_a_matrix_that_a_pass_made(weights_of, hold):
    held = hold(LLAMA, weights_of(LLAMA), "int8")
    largest = max(held[name].data.nbytes for name in held.names() if name.startswith("blk.") and "norm" not in name)
    one, four = (measure_native(LLAMA, held, 16, threads).workspace for threads in (1, 4))
    assert four - one == 3 * largest


def test_values_that_a_pass_changed_are_held_and_claimed(driver, weights_of):
    def half(tensor: Any) -> Any:
        """Every second layer, as another type than the file's."""
        return tensor.replaced(tensor.float32()) if ".1." in tensor.name else tensor

    weights = weights_of(LLAMA, kind="Q4_1")
    image = image_of(LLAMA, change_weights(image_of(LLAMA, weights), half).weights)
    footprint = driver.footprint(image, 64)
    assert isinstance(answer(driver, image, [1, 2, 3]), Sampled)
    driver.load("m", image, Placement(extents=(), page_tokens=16, pages=20)).result()
    assert driver.memory().weights == sum(footprint.extents)


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.0.ffn_norm.weight", "blk.0.attn_v.weight"])
def test_a_tensor_that_is_too_short_is_refused_before_native_code_reads_it(native, weights_of, name):
    weights = weights_of(LLAMA)
    tensor = weights[name]
    short = tensor.replaced(tensor.float32()[: len(tensor.float32()) // 2])

    class Shortened:
        def __getitem__(self, asked):
            return short if asked == name else weights[asked]

        def __getattr__(self, attribute):
            return getattr(weights, attribute)

        def __contains__(self, asked):
            return asked in weights

    with pytest.raises(FormatError, match="sizes"):
        native(LLAMA, Shortened())
