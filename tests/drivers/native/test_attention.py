"""Attention over pages against float64 on the same float16 keys and values; and the same bits however pages lie,
prompts are cut and batches are made up."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from llm_os.drivers.native.attention import TILE

SCALE = 0.7


def address(array: np.ndarray) -> int:
    return array.ctypes.data


class Sequences:
    """Several sequences' keys and values in shuffled pages; all else in the pages is NaN."""

    def __init__(self, lengths: list[int], kv_heads: int, dim: int, page_tokens: int = 16, seed: int = 0) -> None:
        numbers = np.random.default_rng(seed)
        self.kv_heads, self.dim, self.page_tokens = kv_heads, dim, page_tokens
        self.keys = [numbers.standard_normal((n, kv_heads, dim)).astype(np.float16) for n in lengths]
        self.values = [numbers.standard_normal((n, kv_heads, dim)).astype(np.float16) for n in lengths]
        counts = [-(-n // page_tokens) for n in lengths]
        order = numbers.permutation(sum(counts) + 3)
        self.pages = np.full((len(order), 2, kv_heads, page_tokens * dim), np.nan, np.float16)
        self.tables = np.split(order[: sum(counts)], np.cumsum(counts)[:-1])
        for table, keys, values in zip(self.tables, self.keys, self.values, strict=True):
            padded = np.full((2, len(table) * page_tokens, kv_heads, dim), np.nan, np.float16)
            padded[0, : len(keys)], padded[1, : len(keys)] = keys, values
            blocks = padded[0].reshape(len(table), page_tokens // 16, 16, kv_heads, dim).transpose(0, 3, 1, 4, 2)
            self.pages[table, 0] = blocks.reshape(len(table), kv_heads, -1)
            tokens = padded[1].reshape(len(table), page_tokens, kv_heads, dim).transpose(0, 2, 1, 3)
            self.pages[table, 1] = tokens.reshape(len(table), kv_heads, -1)

    def attend(
        self,
        workbench: Any,
        queries: list[np.ndarray],
        pieces: list[tuple[int, int, int]],
        window: int | None = None,
        threads=1,
    ) -> list[np.ndarray]:
        """For each of `pieces`, (sequence, first position, rows): what its rows get, [rows, heads, dim]. `queries` are
        each sequence's, [length, heads, dim], scaled."""
        rows = np.concatenate([queries[i][start : start + count] for i, start, count in pieces])
        heads = rows.shape[1]
        wide = np.zeros((len(rows), heads + 2 * self.kv_heads, self.dim), np.float32)  # as the model has them
        wide[:, :heads] = rows * np.float32(SCALE * math.log2(math.e))
        out = np.full(rows.shape, np.nan, np.float32)
        begins = np.concatenate(self.tables) * self.pages[0].size
        stands = np.cumsum([0, *map(len, self.tables)])
        tiles, row = [], 0
        for i, start, count in pieces:
            for at in range(0, count, TILE):
                tiles.append((row + at, min(TILE, count - at), start + at, stands[i]))
            row += count
        placed = np.array(tiles, np.int64)
        head_bytes = self.page_tokens * self.dim * 2
        keys = address(self.pages)
        workbench.run(
            [
                "attention", self.kv_heads, 0,
                address(wide), wide[0].size, address(out), out[0].size,
                keys, keys + self.kv_heads * head_bytes, head_bytes, window or 1 << 40, self.page_tokens,
            ],
            rows=len(rows), state=(len(placed), 0, 0, address(placed), address(begins)), threads=threads,
        )  # fmt: skip
        return np.split(out, np.cumsum([count for _, _, count in pieces])[:-1])

    def expected(self, queries: np.ndarray, sequence: int, start: int, window: int | None) -> np.ndarray:
        """What rows at `start` and after get, in float64."""
        group = queries.shape[1] // self.kv_heads
        keys, values = (
            np.repeat(each[sequence].astype(np.float64), group, axis=1) for each in (self.keys, self.values)
        )
        scores = SCALE * np.einsum("qhd,khd->hqk", queries.astype(np.float64), keys)
        now, then = start + np.arange(len(queries))[:, None], np.arange(len(keys))
        hidden = (then > now) | (then <= now - (window or 1 << 40))
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), values)


def queries_for(sequences: Sequences, group: int, seed: int = 9) -> list[np.ndarray]:
    numbers = np.random.default_rng(seed)
    return [
        (numbers.standard_normal((len(keys), sequences.kv_heads * group, sequences.dim)) / sequences.dim**0.5).astype(
            "f4"
        )
        for keys in sequences.keys
    ]


SHAPES = [
    (16, 2),
    (32, 5),
    (64, 1),
    (64, 3),
    (64, 8),
    (80, 2),
    (80, 7),
    (96, 4),
    (128, 4),
    (128, 7),
    (256, 3),
    (256, 8),
]


@pytest.mark.parametrize(("dim", "group"), SHAPES)
@pytest.mark.parametrize("window", [None, 21])
def test_attention_is_that_of_float64(workbench, dim, group, window):
    sequences = Sequences([1, 15, 16, 50], 2, dim)
    queries = queries_for(sequences, group)
    pieces = [(0, 0, 1), (1, 0, 15), (2, 15, 1), (3, 0, 50), (3, 17, 33), (3, 49, 1)]
    found = sequences.attend(workbench(head_dim=dim, group=group), queries, pieces, window)
    for (i, start, count), rows in zip(pieces, found, strict=True):
        expected = sequences.expected(queries[i][start : start + count], i, start, window)
        np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("window", "page_tokens"), [(None, 16), (None, 48), (1, 48), (16, 128), (700, 16)])
def test_long_contexts_in_shuffled_pages(workbench, way, window, page_tokens):
    sequences = Sequences([3000, 40, 2047], 1, 64, page_tokens)
    queries = queries_for(sequences, 3)
    pieces = [(2, 2046, 1), (0, 2950, 50), (1, 0, 40), (0, 1023, 2)]
    found = sequences.attend(workbench(way), queries, pieces, window)
    for (i, start, count), rows in zip(pieces, found, strict=True):
        expected = sequences.expected(queries[i][start : start + count], i, start, window)
        np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-6)


def test_large_scores_are_a_choice_and_not_an_overflow(workbench):
    sequences = Sequences([400], 2, 64)
    queries = [3e3 * queries_for(sequences, 3)[0]]
    (found,) = sequences.attend(workbench(), queries, [(0, 0, 400)])
    expected = sequences.expected(queries[0], 0, 0, None)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("dim", "group"), [(64, 3), (80, 7), (128, 4), (256, 3)])
@pytest.mark.parametrize("window", [None, 21, 64])
def test_nothing_but_a_querys_own_past_changes_a_bit(workbench, dim, group, window):
    """Not how its prompt was cut, who shares the batch, how many threads there are, or where pages lie."""
    lengths = [200, 37, 131, 16]
    workbench = workbench(head_dim=dim, group=group)
    chance = random.Random(dim)
    reference = None
    for page_tokens in (16, 32, 80):
        sequences = Sequences(lengths, 2, dim, page_tokens, seed=1)
        queries = queries_for(sequences, group)
        if reference is None:
            reference = sequences.attend(workbench, queries, [(i, 0, n) for i, n in enumerate(lengths)], window)
        for _ in range(4):
            pieces = []
            for i, length in enumerate(lengths):
                at = 0
                while at < length:
                    count = min(chance.choice([1, 1, 2, 7, 15, 16, 17, 40, 200]), length - at)
                    pieces.append((i, at, count))
                    at += count
            chance.shuffle(pieces)
            while pieces:
                batch = [pieces.pop() for _ in range(min(len(pieces), chance.randint(1, 12)))]
                found = sequences.attend(workbench, queries, batch, window, chance.choice([1, 2, 3]))
                for (i, start, count), rows in zip(batch, found, strict=True):
                    assert np.array_equal(rows, reference[i][start : start + count])


def test_every_processor_gives_the_same_bits(workbench, way):
    sequences = Sequences([200, 37], 2, 64)
    queries = queries_for(sequences, 3)
    pieces = [(0, 0, 200), (1, 0, 37), (0, 150, 1)]
    for mine, others in zip(
        sequences.attend(workbench(way), queries, pieces), sequences.attend(workbench(), queries, pieces), strict=True
    ):
        assert np.array_equal(mine, others)


def test_keys_that_are_not_numbers_are_seen_by_those_who_come_after_and_nobody_else(workbench):
    sequences = Sequences([60, 60], 2, 64)
    queries = queries_for(sequences, 3)
    pieces = [(0, 0, 60), (1, 0, 60)]
    expected = sequences.attend(workbench(), queries, pieces)
    page = sequences.pages[sequences.tables[0][2], 0, 1].reshape(64, 16)
    page[:, 5] = np.nan  # position 37 of the second key head
    sick, healthy = sequences.attend(workbench(), queries, pieces)
    assert np.array_equal(healthy, expected[1])
    assert np.isnan(sick[37:, 3:]).all()
    assert np.array_equal(sick[:, :3], expected[0][:, :3])
    assert np.array_equal(sick[:37], expected[0][:37])
