"""Rule 4: a row's logits are the same bits whoever shares its batch and however its prompt was cut."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from llm_os.drivers.formats.image import open_image

MODES = ["exact", "exact+int8", "exact+int4"]


def alone(bench, tokens, pages):
    """Every row's logits when the sequence is computed by itself, in one piece."""
    return bench.feed((tokens, 0, pages))[0]


def in_company(bench, chance, prompts, tables, limit):
    """The same rows, from batches of several sequences, cut at random and in a random order."""
    done = [0] * len(prompts)
    rows = [[] for _ in prompts]
    while any(count < len(prompt) for count, prompt in zip(done, prompts, strict=True)):
        waiting = [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]
        chosen = chance.sample(waiting, chance.randint(1, len(waiting)))
        batch = []
        for i in chosen:
            length = min(chance.choice([1, 1, 2, 15, 16, 17, 33, limit]), len(prompts[i]) - done[i])
            batch.append((prompts[i][done[i] : done[i] + length], done[i], tables[i]))
            done[i] += length
        for i, logits in zip(chosen, bench.feed(*batch), strict=True):
            rows[i].append(logits)
    return [torch.cat(pieces) for pieces in rows]


def scattered(chance, lengths, page_tokens, pages):
    """Page tables without a common page, some in runs and some not."""
    free = list(range(pages))
    chance.shuffle(free)
    tables = []
    for length in lengths:
        count = -(-length // page_tokens)
        table, free = free[:count], free[count:]
        tables.append(tuple(sorted(table) if chance.random() < 0.5 else table))
    return tables


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_a_row_is_the_same_bits_alone_and_in_any_company(architecture, weights_of, bench, mode, seed):
    chance = random.Random(seed)
    page_tokens = chance.choice([8, 9, 16, 31])
    bench = bench(architecture, weights_of(architecture), mode, page_tokens, 200)
    lengths = [1, 2, 17, 40, chance.randint(100, 140), chance.randint(250, 300)]
    prompts = [[chance.randrange(architecture.vocab_size) for _ in range(length)] for length in lengths]
    apart = [alone(bench, prompt, tuple(range(40))) for prompt in prompts]
    together = in_company(bench, chance, prompts, scattered(chance, lengths, page_tokens, 200), 200)
    for reference, logits in zip(apart, together, strict=True):
        assert torch.equal(reference, logits)


@pytest.mark.parametrize("mode", MODES)
def test_thirty_two_rows_decode_together_as_each_alone(architecture, weights_of, bench, mode):
    chance = random.Random(7)
    bench = bench(architecture, weights_of(architecture), mode, 8, 33 * 5)
    prompts = [[chance.randrange(architecture.vocab_size) for _ in range(3 + i)] for i in range(32)]
    tables = [tuple(range(i * 5, i * 5 + 5)) for i in range(32)]
    bench.feed(*[(prompt[:-1], 0, table) for prompt, table in zip(prompts, tables, strict=True)])
    batch = [([prompt[-1]], len(prompt) - 1, table) for prompt, table in zip(prompts, tables, strict=True)]
    together = bench.feed(*batch)
    chance.shuffle(batch)
    shuffled = {table: logits for (_, _, table), logits in zip(batch, bench.feed(*batch), strict=True)}
    spare = tuple(range(160, 165))
    for prompt, table, logits in zip(prompts, tables, together, strict=True):
        assert torch.equal(logits, shuffled[table])
        assert torch.equal(logits[0], alone(bench, prompt, spare)[-1])


@pytest.mark.parametrize("mode", MODES)
def test_recomputing_a_long_sequence_gives_what_decoding_gave(architecture, weights_of, bench, mode):
    chance = random.Random(3)
    bench = bench(architecture, weights_of(architecture), mode, 32, 80)
    tokens = [chance.randrange(architecture.vocab_size) for _ in range(1100)]  # past one span of 1024 keys
    first, second = tuple(range(40)), tuple(range(79, 39, -1))
    bench.feed((tokens[:1015], 0, first))
    decoded = [bench.feed(([token], 1015 + i, first))[0] for i, token in enumerate(tokens[1015:1030])]
    recomputed = bench.feed((tokens, 0, second))[0]
    assert torch.equal(torch.cat(decoded), recomputed[1015:1030])


@pytest.mark.parametrize("mode", MODES)
def test_a_neighbour_full_of_nan_is_not_noticed(architecture, weights_of, bench, mode):
    bench = bench(architecture, weights_of(architecture), mode, 16, 20)
    tokens = [5, 6, 7, 8, 9]
    reference = alone(bench, tokens, (3, 4))
    bench.pool.page(5).fill_(torch.nan)
    sick, healthy = bench.feed(([1], 16, (5, 6)), (tokens, 0, (7, 8)))
    assert sick.isnan().all()
    assert torch.equal(healthy, reference)


@pytest.mark.parametrize("mode", MODES)
def test_smollm2_rows_are_the_same_bits_alone_and_in_any_company(smollm2: Path, bench, mode):
    image = open_image(smollm2)
    bench = bench(image.hyperparameters, image.weights, mode, 16, 60)
    image.close()
    chance = random.Random(11)
    lengths = [3, 16, 35]
    prompts = [[chance.randrange(image.hyperparameters.vocab_size) for _ in range(length)] for length in lengths]
    apart = [alone(bench, prompt, tuple(range(3))) for prompt in prompts]
    together = in_company(bench, chance, prompts, scattered(chance, lengths, 16, 60), 20)
    for reference, logits in zip(apart, together, strict=True):
        assert torch.equal(reference, logits)
