"""Chooses the next token of each row from its logits. No state, no random numbers: `Sample.uniform` is the randomness.

Order: penalties -> logit bias -> mask -> (greedy, or) temperature -> top-k -> top-p -> min-p -> inverse of the
distribution function over the tokens that are left, most likely first. Ties go to the lower token id. Reported
log-probabilities are the model's own, before all of this. Each row is worked on alone, in float64, so that it cannot
depend on the others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_os.kernel.driver import Row, RowError, Sample, Sampled
from llm_os.kernel.errors import DriverError, Error

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
_FIRST = 256  # tokens that are ordered at first


class Scores(NamedTuple):
    """What the model computed for some rows."""

    logits: Tensor  # [n, vocab_size]
    best: list[int]  # the greatest of each row, the first of equals
    finite: list[bool]  # whether all of a row are


def scores_of(logits: Tensor) -> Scores:
    return Scores(logits, logits.argmax(dim=-1).tolist(), torch.isfinite(logits).all(dim=-1).tolist())


def sample(
    scores: Scores, samples: list[Sample], guesses: list[int | None] | None = None, before: Row = None
) -> list[Row]:
    """One choice for each row of `scores`. A row with NaN or infinity is a RowError, and
    one whose mask fails; for that it waits.

    A row that was fed a guess gets None unless the row before it, of the first one `before`, chose that token."""
    rows: list[Row] = []
    for row, wish in enumerate(samples):
        guess = None if guesses is None else guesses[row]
        if guess is None or (isinstance(before, Sampled) and before.token == guess):
            before = _try(scores.logits[row], wish, scores.best[row], scores.finite[row])
        else:
            before = None
        rows.append(before)
    return rows


def _try(logits: Tensor, wish: Sample, best: int, finite: bool) -> Sampled | RowError:
    if not finite:
        return RowError("the model computed NaN or infinity for this row; its weights may be damaged")
    try:
        return _choose(logits, wish, best)
    except Error as error:
        return RowError(str(error), error)


def _choose(logits: Tensor, wish: Sample, best: int) -> Sampled:
    adjusts = wish.repetition_penalty != 1 or wish.presence_penalty or wish.frequency_penalty or wish.logit_bias
    if wish.temperature == 0 and not adjusts and wish.mask is None and wish.logprobs is None:
        return Sampled(best)
    scores = logits.double().cpu().numpy()
    adjusted = _penalised(scores, wish) if adjusts else scores
    allowed = None if wish.mask is None else _allowed(wish.mask.bits(), len(scores))
    if allowed is not None:
        adjusted = adjusted[allowed]
    token = best
    if wish.temperature > 0:
        token = _draw(adjusted, wish)
    elif adjusts or allowed is not None:
        token = int(adjusted.argmax())
    if allowed is not None:
        token = int(allowed[token])
    if wish.logprobs is None:
        return Sampled(token)
    shifted = scores - scores.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    top = _best(logprobs, wish.logprobs)
    return Sampled(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))


def _allowed(bits: bytes, vocab: int) -> Ids:
    """The ids that a mask leaves, in order. Raises DriverError if there are none."""
    ids = np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), count=vocab, bitorder="little"))
    if not len(ids):
        raise DriverError("the mask of this row leaves no token of the model's")
    return ids


def _penalised(scores: Floats, wish: Sample) -> Floats:
    """Repetition over prompt and output (Keskar et al. 2019); presence and frequency over the output; then the bias."""
    scores = scores.copy()
    vocab = len(scores)
    if wish.repetition_penalty != 1:
        seen = _known(np.unique(np.array(wish.prompt + wish.output, np.int64)), vocab)
        scores[seen] = np.where(
            scores[seen] > 0, scores[seen] / wish.repetition_penalty, scores[seen] * wish.repetition_penalty
        )
    if (wish.presence_penalty or wish.frequency_penalty) and wish.output:
        counts = np.bincount(_known(np.array(wish.output, np.int64), vocab), minlength=vocab)
        scores -= wish.presence_penalty * (counts > 0) + wish.frequency_penalty * counts
    for token, bias in wish.logit_bias:
        if token < vocab:
            scores[token] += bias
    return scores


def _known(ids: Ids, vocab: int) -> Ids:
    return ids[(ids >= 0) & (ids < vocab)]


def _draw(scores: Floats, wish: Sample) -> int:
    """Orders no more tokens than it takes: of a large vocabulary a few hold nearly all of the distribution."""
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, which is right
        scaled = (scores - scores.max()) / wish.temperature
    every = np.exp(scaled)
    most = min(wish.top_k or len(scaled), len(scaled))
    count = most if most < len(scaled) else min(_FIRST, most)
    while True:
        order = _best(scaled, count)
        weights = every[order]
        cumulative = np.cumsum(weights)
        total = cumulative[-1] if most < len(scaled) else every.sum()
        kept = count
        if wish.top_p < 1:
            kept = max(1, int(np.count_nonzero(cumulative - weights < wish.top_p * total)))
        if wish.min_p > 0:
            kept = max(1, int(np.count_nonzero(weights[:kept] >= wish.min_p * weights[0])))
        cut = wish.top_p < 1 or wish.min_p > 0
        goal = wish.uniform * (cumulative[kept - 1] if cut else total)
        if count == most or (kept < count if cut else goal < cumulative[-1]):
            index = int(np.searchsorted(cumulative[:kept], goal, side="right"))
            return int(order[min(index, kept - 1)])
        count = min(most, 16 * count)


def _best(values: Floats, count: int) -> Ids:
    """The `count` largest, best first, ties by id."""
    count = min(count, len(values))
    if count == 0:
        return np.empty(0, np.int64)
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]
