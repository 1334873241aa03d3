"""The sampler against a plain reference that is written the slow way, and against the distribution it should draw."""

from __future__ import annotations

import math
import random

import pytest
import torch

from llm_os.drivers.torch import sampler
from llm_os.kernel.driver import RowError, Sample, Sampled


def sample(logits, wishes):
    return sampler.sample(sampler.scores_of(logits), wishes)


def softmax(scores):
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def adjusted(logits, wish):
    scores = list(logits)
    for token in set(wish.prompt) | set(wish.output):
        factor = wish.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(wish.output):
        scores[token] -= wish.presence_penalty + wish.frequency_penalty * wish.output.count(token)
    for token, bias in wish.logit_bias:
        scores[token] += bias
    return scores


def kept(logits, wish):
    """[(token, probability)] after all filters, most likely first, by the definition of each filter."""
    scores = adjusted(logits, wish)
    scaled = softmax([score / wish.temperature for score in scores])
    left = sorted(enumerate(scaled), key=lambda pair: (-pair[1], pair[0]))
    if wish.top_k:
        left = left[: wish.top_k]
    total = math.fsum(p for _, p in left)
    prefix, mass = [], 0.0
    for token, p in left:
        prefix.append((token, p))
        mass += p / total
        if mass >= wish.top_p:
            break
    left = prefix if wish.top_p < 1 else left
    left = [(token, p) for token, p in left if p >= wish.min_p * left[0][1]]
    total = math.fsum(p for _, p in left)
    return [(token, p / total) for token, p in left]


def reference(logits, wish):
    if wish.temperature == 0:
        scores = adjusted(logits, wish)
        return scores.index(max(scores))
    mass = 0.0
    for token, p in kept(logits, wish):
        mass += p
        if wish.uniform < mass:
            return token
    return token


def logits_of(seed, vocab=50):
    return (3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))).tolist()


def random_wish(chance, vocab=50):
    tokens = [chance.randrange(vocab) for _ in range(12)]
    return Sample(
        uniform=chance.random(),
        temperature=chance.choice([0.0, 0.3, 1.0, 1.7]),
        top_k=chance.choice([0, 1, 5, 20, 1000]),
        top_p=chance.choice([1.0, 0.9, 0.5, 0.01]),
        min_p=chance.choice([0.0, 0.05, 0.5]),
        repetition_penalty=chance.choice([1.0, 1.3, 0.8]),
        presence_penalty=chance.choice([0.0, 0.7]),
        frequency_penalty=chance.choice([0.0, 0.4, -0.2]),
        logit_bias=chance.choice([(), ((3, 5.0), (7, -100.0))]),
        prompt=tuple(tokens[:6]),
        output=tuple(tokens[4:]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_every_mix_of_options_chooses_what_the_reference_chooses(seed):
    chance = random.Random(seed)
    rows = [logits_of(seed * 100 + i) for i in range(16)]
    wishes = [random_wish(chance) for _ in rows]
    chosen = sample(torch.tensor(rows), wishes)
    assert [row.token for row in chosen] == [reference(row, wish) for row, wish in zip(rows, wishes, strict=True)]


@pytest.mark.parametrize("flat", [0.01, 1.0, 3.0])
def test_a_large_vocabulary_is_drawn_from_as_a_small_one(flat):
    """However many tokens it takes: nearly all of them where they are equally likely."""
    logits = [flat * score for score in logits_of(9, vocab=6000)]
    chance = random.Random(3)
    wishes = [
        Sample(uniform=(n + chance.random()) / 12, temperature=1.0, top_p=top_p, min_p=min_p, top_k=top_k)
        for n, (top_p, min_p, top_k) in enumerate(
            [(1.0, 0.0, 0)] * 4 + [(0.97, 0.0, 0)] * 3 + [(1.0, 0.02, 0)] * 2 + [(0.5, 0.0, 700), (1.0, 0.0, 5000)] * 1
        )
    ]
    chosen = sample(torch.tensor([logits] * len(wishes)), wishes)
    exact = torch.tensor(logits).tolist()
    assert [row.token for row in chosen] == [reference(exact, wish) for wish in wishes]


@pytest.mark.parametrize(
    "wish",
    [
        Sample(uniform=0, temperature=1.0),
        Sample(uniform=0, temperature=0.7, top_k=8),
        Sample(uniform=0, temperature=1.3, top_p=0.8),
        Sample(uniform=0, temperature=1.0, min_p=0.1),
    ],
)
def test_draws_follow_the_distribution_that_the_filters_leave(wish):
    logits, draws = logits_of(5), 2000
    counts = [0] * len(logits)
    for i in range(draws):
        even = Sample(
            uniform=(i + 0.5) / draws,
            temperature=wish.temperature,
            top_k=wish.top_k,
            top_p=wish.top_p,
            min_p=wish.min_p,
        )
        counts[sample(torch.tensor([logits]), [even])[0].token] += 1
    expected = dict(kept(logits, wish))
    assert {token for token, count in enumerate(counts) if count} <= expected.keys()
    chi_square = sum((counts[token] - draws * p) ** 2 / (draws * p) for token, p in expected.items())
    assert chi_square < len(expected)  # an even grid of draws is far closer than random ones would be
    assert all(abs(counts[token] - draws * p) <= 1 for token, p in expected.items())


def test_greedy_takes_the_lowest_id_of_equals():
    logits = torch.zeros(1, 40)
    logits[0, [9, 4, 30]] = 2.5
    assert sample(logits, [Sample(uniform=0.9)])[0].token == 4


def test_drawing_orders_equals_by_id():
    logits = torch.zeros(1, 4)
    chosen = [sample(logits, [Sample(uniform=u, temperature=1.0)])[0].token for u in (0, 0.25, 0.5, 0.75)]
    assert chosen == [0, 1, 2, 3]
    assert sample(logits, [Sample(uniform=0.99, temperature=1.0, top_k=2)])[0].token == 1


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = logits_of(1)
    row = sample(torch.tensor([logits]), [Sample(uniform=0.999999, temperature=temperature)])[0]
    assert row.token == logits.index(max(logits))


def test_top_p_zero_keeps_the_best():
    logits = logits_of(2)
    row = sample(torch.tensor([logits]), [Sample(uniform=0.9999, temperature=1.0, top_p=0.0)])[0]
    assert row.token == logits.index(max(logits))


def test_logprobs_are_the_models_own_whatever_the_options():
    logits = logits_of(3)
    wish = Sample(uniform=0.3, temperature=0.2, top_k=3, logit_bias=((1, 50.0),), logprobs=4)
    row = sample(torch.tensor([logits]), [wish])[0]
    expected = [math.log(p) for p in softmax(logits)]
    assert row.token == 1
    assert row.logprob == pytest.approx(expected[1], abs=1e-6)
    best = sorted(range(len(logits)), key=lambda token: -logits[token])[:4]
    assert [token for token, _ in row.top] == best
    assert [logprob for _, logprob in row.top] == pytest.approx([expected[token] for token in best], abs=1e-6)


def test_logprobs_zero_reports_the_chosen_token_only():
    row = sample(torch.tensor([logits_of(3)]), [Sample(uniform=0, logprobs=0)])[0]
    assert row.logprob is not None
    assert row.top == ()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_row_fails_alone(poison):
    logits = torch.tensor([logits_of(1), logits_of(2), logits_of(3)])
    logits[1, 7] = poison
    wish = Sample(uniform=0.5, temperature=1.0)
    first, second, third = sample(logits, [wish, wish, wish])
    assert isinstance(second, RowError)
    assert "NaN" in second.message
    assert first == Sampled(reference(logits_of(1), wish))
    assert third == Sampled(reference(logits_of(3), wish))


def test_ids_outside_the_vocabulary_are_ignored():
    logits = logits_of(4)
    wish = Sample(uniform=0, repetition_penalty=2.0, prompt=(10_000,), logit_bias=((10_000, 9.0),))
    assert sample(torch.tensor([logits]), [wish])[0].token == logits.index(max(logits))


def test_a_row_chooses_the_same_in_any_company():
    chance = random.Random(0)
    rows = torch.tensor([logits_of(i, 999) for i in range(9)])
    wishes = [Sample(uniform=chance.random(), temperature=1.0, top_p=0.95, logprobs=3) for _ in rows]
    together = sample(rows, wishes)
    assert together == [sample(rows[i : i + 1], [wishes[i]])[0] for i in range(9)]
