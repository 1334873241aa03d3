"""How far each engine's arithmetic is from float32 on the same file: this project's exact mode is the reference.

All read the same windows of the shipped texts. Perplexity is over every token but the first of a window; the divergence
is over the tokens among the likeliest of both, all others counting as one (plugins/quantize/report.py).
"""

from __future__ import annotations

import math
from typing import Any

from bench import Bench
from environments import OURS

from llm_os import TokenLogprob
from llm_os.plugins.quantize.report import divergence

_TOP = 256  # likeliest tokens that are compared
_NO_LOGITS = "it gives no log-probabilities of given tokens"
PERPLEXITY = "fidelity: perplexity, less exact's"
DIVERGENCE = "fidelity: mean KL from exact"
DISAGREEMENT = "fidelity: other first choice than exact"


def fidelity(bench: Bench) -> None:
    texts = bench.prompts.to_score(bench.plan.positions)
    with bench.doing("fidelity, llm-os exact"):
        exact = bench.ask(OURS, PERPLEXITY, "score", texts=texts, top=_TOP, precision="exact")
    if exact is None:
        return
    reference = _lines(exact)
    for peer in bench.engines:
        if peer.name == "openvino":
            bench.results.miss("fidelity", peer.name, _NO_LOGITS)
            continue
        with bench.doing(f"fidelity, {peer.name}"):
            scores = bench.ask(peer, PERPLEXITY, "score", texts=texts, top=_TOP)
        if scores is not None:
            _compare(bench, peer.name, reference, _lines(scores))
    bench.results.details["fidelity"] = {"positions": len(reference), "perplexity of exact": _perplexity(reference)}


def _lines(scores: list[list[Any]]) -> list[TokenLogprob]:
    return [
        TokenLogprob(-1, logprob, tuple((token, each) for token, each in top))
        for text in scores
        for logprob, top in text
    ]


def _perplexity(lines: list[TokenLogprob]) -> float:
    return math.exp(-sum(line.logprob for line in lines) / len(lines))


def _compare(bench: Bench, name: str, exact: list[TokenLogprob], lines: list[TokenLogprob]) -> None:
    pairs = list(zip(exact, lines, strict=True))
    add = bench.results.add
    add(PERPLEXITY, "%", name, 100 * abs(_perplexity(lines) / _perplexity(exact) - 1))
    add(DIVERGENCE, "nats", name, sum(divergence(*pair) for pair in pairs) / len(pairs))
    differ = sum(before.top[0][0] != after.top[0][0] for before, after in pairs)
    add(DISAGREEMENT, "%", name, 100 * differ / len(pairs))
