"""How far a compressed model is from the one it was made of: both read the same texts. No files but the shipped texts.

perplexity     exp of the mean of -log p(token), over all tokens but the first of each window
agreement      how often both would choose the same next token
kl             mean Kullback-Leibler divergence from the model to the compressed one, over the tokens that are among
               the 64 likeliest of both, and all others as one: a lower bound that misses little
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import files

from msgspec import Struct

import llm_os
from llm_os import TokenLogprob

WINDOW = 128  # tokens that are read together, at most
POSITIONS = 2560
_TOP = 64


class Figures(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one text, or of all."""

    positions: int
    perplexity_before: float
    perplexity_after: float
    agreement: float  # 0 to 1
    kl: float  # nats

    @property
    def increase(self) -> float:
        """Of perplexity, as a share: 0.05 is 5% more."""
        return self.perplexity_after / self.perplexity_before - 1


class Report(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model and one pass."""

    model: str
    compression: str  # the pass
    precision: str
    device: str
    total: Figures
    texts: dict[str, Figures]
    bytes_before: int  # of weights, on the device
    bytes_after: int


def shipped_texts() -> dict[str, str]:
    """Prose, code and other languages: the project's own."""
    folder = files("llm_os.plugins.quantize").joinpath("texts")
    return {name: folder.joinpath(f"{name}.txt").read_text("utf-8") for name in ("prose", "code", "languages")}


def windows(texts: Mapping[str, list[int]], positions: int) -> list[tuple[str, list[int]]]:
    """Pieces of the texts in turn, until they have so many tokens to predict; (text, tokens) each."""
    length = max(16, min(WINDOW, positions // 8)) + 1
    cut = {name: [ids[i : i + length] for i in range(0, len(ids), length)] for name, ids in texts.items()}
    chosen: list[tuple[str, list[int]]] = []
    left = positions
    for turn in range(max(map(len, cut.values()), default=0)):
        for name, pieces in cut.items():
            if turn < len(pieces) and left > 0 and len(piece := pieces[turn][: left + 1]) > 1:
                chosen.append((name, piece))
                left -= len(piece) - 1
    return chosen


def compare(model: str, compression: str, texts: Mapping[str, str], positions: int, config: llm_os.Config) -> Report:
    """Read the texts with both models, one after the other. Raises RequestError for texts that are too short, and what
    `llm_os.score` does."""
    image = llm_os.open_image(model, config)
    try:
        ids = {name: image.encode(text, raw=True) for name, text in texts.items()}
    finally:
        image.close()
    chosen = windows(ids, positions)
    if not chosen:
        raise llm_os.RequestError("the texts have no two tokens to compare models with; give a longer one")
    pieces = [piece for _, piece in chosen]
    before = llm_os.score(model, pieces, top=_TOP, config=config)
    after = llm_os.score(f"{model}+{compression}", pieces, top=_TOP, config=config)
    named = {
        name: [
            pair
            for (text, _), *lines in zip(chosen, before.texts, after.texts, strict=True)
            if text == name
            for pair in zip(*lines, strict=True)
        ]
        for name in texts
    }
    return Report(
        model=model,
        compression=compression,
        precision=config.precision,
        device=_device(config),
        total=_figures([pair for pairs in named.values() for pair in pairs]),
        texts={name: _figures(pairs) for name, pairs in named.items() if pairs},
        bytes_before=before.weights,
        bytes_after=after.weights,
    )


def _device(config: llm_os.Config) -> str:
    found = {info.driver: info for info in llm_os.probe(config) if info.unavailable is None}
    name = config.driver if config.driver != "auto" else "cuda" if "cuda" in found else "cpu"
    return found[name].device if name in found else name


def _figures(pairs: list[tuple[TokenLogprob, TokenLogprob]]) -> Figures:
    count = len(pairs)
    return Figures(
        positions=count,
        perplexity_before=math.exp(-sum(before.logprob for before, _ in pairs) / count),
        perplexity_after=math.exp(-sum(after.logprob for _, after in pairs) / count),
        agreement=sum(before.top[0][0] == after.top[0][0] for before, after in pairs) / count,
        kl=sum(divergence(before, after) for before, after in pairs) / count,
    )


def divergence(before: TokenLogprob, after: TokenLogprob) -> float:
    """Over the tokens that both list, and the rest as one."""
    p, q = dict(before.top), dict(after.top)
    common = p.keys() & q.keys()
    rest_p = max(1e-12, 1 - sum(math.exp(p[token]) for token in common))
    rest_q = max(1e-12, 1 - sum(math.exp(q[token]) for token in common))
    listed = sum(math.exp(p[token]) * (p[token] - q[token]) for token in common)
    return max(0.0, listed + rest_p * math.log(rest_p / rest_q))
