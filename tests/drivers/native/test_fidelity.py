"""Fast mode against exact mode with a real model, on the prose, code and other languages that the project ships: no
further from it than llama.cpp's arithmetic is on the same file."""

from __future__ import annotations

import math
from contextlib import closing
from itertools import zip_longest
from pathlib import Path

import pytest

import llm_os
from llm_os.plugins.quantize.report import divergence, shipped_texts

WINDOWS, LENGTH = 32, 80  # read side by side, so many tokens to predict in each
TOP = 64  # likeliest tokens that are compared; others count as one

# llama.cpp on the same file, on much the same kind of text: what 8 bits for activations cost there.
PERPLEXITY, DIVERGENCE, AGREEMENT = 0.0042, 0.0037, 0.963


@pytest.fixture(scope="module")
def pairs(smollm2: Path) -> dict[str, list[tuple[llm_os.TokenLogprob, llm_os.TokenLogprob]]]:
    """What both modes think of each token of the texts."""
    with closing(llm_os.open_image(str(smollm2))) as image:
        ids = {name: image.encode(text, raw=True) for name, text in shipped_texts().items()}
    cut = {name: [text[i : i + LENGTH + 1] for i in range(0, len(text), LENGTH + 1)] for name, text in ids.items()}
    turns = zip_longest(*([(name, piece) for piece in pieces] for name, pieces in cut.items()))
    chosen = [each for turn in turns for each in turn if each is not None and len(each[1]) > LENGTH][:WINDOWS]
    pieces = [piece for _, piece in chosen]
    scores = [
        llm_os.score(str(smollm2), pieces, top=TOP, config=llm_os.Config(driver="cpu", precision=mode, memory="2GiB"))
        for mode in ("exact", "fast")
    ]
    assert scores[1].weights < 0.3 * scores[0].weights  # it was held in integers
    found: dict[str, list[tuple[llm_os.TokenLogprob, llm_os.TokenLogprob]]] = {name: [] for name in ids}
    for (name, _), *lines in zip(chosen, *(each.texts for each in scores), strict=True):
        found[name] += zip(*lines, strict=True)
    return found


def test_fast_mode_is_as_near_to_exact_mode_as_llama_cpp_is(pairs) -> None:
    every = [pair for text in pairs.values() for pair in text]
    assert len(every) == WINDOWS * LENGTH
    before, after = (math.exp(-sum(pair[i].logprob for pair in every) / len(every)) for i in range(2))
    divergences = sum(divergence(*pair) for pair in every) / len(every)
    agreement = sum(a.top[0][0] == b.top[0][0] for a, b in every) / len(every)
    print(f"perplexity {before:.3f}, {after / before - 1:+.2%}; KL {divergences:.4f}; same choice {agreement:.1%}")
    assert after / before - 1 <= PERPLEXITY
    assert divergences <= DIVERGENCE
    assert agreement >= AGREEMENT


@pytest.mark.parametrize("name", ["prose", "code", "languages"])
def test_no_kind_of_text_is_far_off(pairs, name) -> None:
    text = pairs[name]
    assert len(text) > 500
    assert sum(divergence(*pair) for pair in text) / len(text) <= 2 * DIVERGENCE
    assert sum(a.top[0][0] == b.top[0][0] for a, b in text) / len(text) >= AGREEMENT - 0.02
    assert max(abs(a.logprob - b.logprob) for a, b in text) < 1
