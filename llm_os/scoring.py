"""What a model thinks of given texts, token by token: for those who compare models, such as a compression's report."""

from __future__ import annotations

import time
from collections.abc import Sequence as Ordered
from contextlib import closing

from msgspec import Struct

from llm_os.kernel.config import Config, show_bytes
from llm_os.kernel.driver import Batch, Driver, Footprint, Placement, Row, RowError, Sample, Sampled, Sequence
from llm_os.kernel.errors import DriverError, Refused, RequestError
from llm_os.kernel.image import Image
from llm_os.kernel.plugins import Plugins
from llm_os.kernel.request import TokenLogprob
from llm_os.kernel.slab import fit_page_tokens

_CERTAIN = 1e9  # a bias that makes any token the chosen one; log-probabilities are those before it


class Scores(Struct, frozen=True, kw_only=True):
    """What `score` found."""

    texts: list[list[TokenLogprob]]  # for each text, its tokens but the first, each given all those before it
    weights: int  # bytes that the device held for the model's weights
    seconds: float  # that the batches took


def score(model: str, texts: Ordered[Ordered[int]], *, top: int = 0, config: Config | None = None) -> Scores:
    """Log-probabilities of the tokens of `texts` (ids, at least two each), with the `top` likeliest at each place.

    Blocking. Boots a driver of its own, without a kernel; texts are fed side by side, one token a step, so that short
    texts are quick. Raises RequestError for a text that does not fit, Refused where memory does not suffice, and what
    `open_image` and drivers raise.
    """
    config = config or Config()
    with (
        closing(Plugins(config)) as plugins,
        closing(plugins.open_image(model)) as image,
        closing(plugins.open_driver()) as driver,
    ):
        for text in texts:
            if not 2 <= len(text) <= image.context_length or not all(0 <= token < image.vocab_size for token in text):
                raise RequestError(
                    f"a text to score has {len(text)} tokens; it must have 2 to {image.context_length} of {image.name}"
                )
        size = min(config.batch_size, config.batch_tokens)
        groups = [list(texts[start : start + size]) for start in range(0, len(texts), size)]
        pages, placement = _place(driver, image, config, groups)
        driver.load(model, image, placement).result()
        began = time.perf_counter()
        found = [line for group in groups for line in _score(driver, model, group, pages, placement.page_tokens, top)]
        return Scores(texts=found, weights=driver.memory().weights, seconds=time.perf_counter() - began)


def _place(driver: Driver, image: Image, config: Config, groups: list[list[Ordered[int]]]) -> tuple[int, Placement]:
    """Pages for each text of a group, and the placement for the largest one. Raises Refused."""
    cost: Footprint = driver.footprint(image, min(config.batch_size, config.batch_tokens))
    frame = config.frame_bytes
    tokens = fit_page_tokens(cost.page_tokens, cost.kv_bytes_per_token, frame)
    if tokens is None:
        raise Refused(f"{image.name}: no KV page fits a frame of {frame} bytes; raise frame_size")
    each = max(-(-len(text) // tokens) for group in groups for text in group) if groups else 1
    pages = each * max(map(len, groups), default=1)
    frames = -(-pages // (frame // (tokens * cost.kv_bytes_per_token)))
    needed = sum(cost.extents) + cost.workspace + frames * frame
    budget = config.budget(driver.info().free_bytes)
    if needed > budget:
        raise Refused(f"{image.name} needs {show_bytes(needed)} to score texts, of {show_bytes(budget)}; raise memory")
    return each, Placement(extents=(), page_tokens=tokens, pages=pages)


def _score(
    driver: Driver, model: str, texts: list[Ordered[int]], pages: int, page_tokens: int, top: int
) -> list[list[TokenLogprob]]:
    found: list[list[TokenLogprob]] = [[] for _ in texts]
    for position in range(max(map(len, texts)) - 1):
        active = [index for index, text in enumerate(texts) if position + 1 < len(text)]
        sequences = []
        for index in active:
            table = tuple(range(index * pages, index * pages + position // page_tokens + 1))
            wish = Sample(uniform=0.0, logit_bias=((texts[index][position + 1], _CERTAIN),), logprobs=top)
            token = (texts[index][position],)
            sequences.append(Sequence(pid=index, salt=0, tokens=token, position=position, pages=table, sample=wish))
        rows = driver.run(Batch(model=model, sequences=tuple(sequences))).result()
        for index, row in zip(active, rows, strict=True):
            found[index].append(_checked(row, texts[index][position + 1]))
    return found


def _checked(row: Row, token: int) -> TokenLogprob:
    if isinstance(row, RowError):
        raise DriverError(row.message)
    if not isinstance(row, Sampled) or row.logprob is None or row.token != token:
        raise DriverError("the driver gave no log-probability for a token that it was asked for")
    return TokenLogprob(row.token, row.logprob, row.top)
