"""One driver with one model on it, and page tables as the kernel would lay them out: what driver tests are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, islice
from typing import Any

from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, Driver, Extent, Guess, Placement, Row, Sample, Sampled, Sequence
from llm_os.kernel.image import Image

GREEDY = Sample(uniform=0.5)
PROMPT = tuple(range(40, 90))


class Bench:
    """One driver with one model loaded, and an allocator as plain as can be: weights from the first frame on, pages
    from the last frame down, nothing ever reused."""

    def __init__(self, driver: Driver, config: Config, image: Image, model: str) -> None:
        self.driver, self.image, self.model = driver, image, model
        cost = self.driver.footprint(image, 512)
        self.frame_bytes, self.frames = config.frame_bytes, config.budget(0) // config.frame_bytes
        self.sizes = [-(-size // self.frame_bytes) for size in (*cost.extents, cost.workspace)]
        fitting = [n for n in cost.page_tokens if n * cost.kv_bytes_per_token <= self.frame_bytes]
        self.page_tokens = min(fitting, key=lambda n: abs(n - 16))
        self.page_bytes = self.page_tokens * cost.kv_bytes_per_token
        self.slots = self.frame_bytes // self.page_bytes
        self.free = iter(
            [frame * self.slots + slot for frame in reversed(range(self.frames)) for slot in range(self.slots)]
        )
        self.placement = self.place(0)
        self.load()

    def place(self, first: int) -> Placement:
        """Weights and workspace from frame `first` on."""
        starts = accumulate(self.sizes, initial=first)
        extents = tuple(Extent(start, size) for start, size in zip(starts, self.sizes, strict=False))
        return Placement(extents=extents, page_tokens=self.page_tokens, pages=self.frames * self.slots)

    def load(self) -> None:
        self.driver.load(self.model, self.image, self.placement).result(120)

    @contextmanager
    def unloaded(self) -> Iterator[None]:
        self.driver.unload(self.model).result(60)
        try:
            yield
        finally:
            self.load()

    @contextmanager
    def other(self, placement: Placement) -> Iterator[str]:
        """A second model, which gives everything back afterwards."""
        self.driver.load("other", self.image, placement).result(120)
        try:
            yield "other"
        finally:
            self.driver.unload("other").result(60)
            self.driver.release("other").result(60)

    def pages(self, tokens: int) -> tuple[int, ...]:
        return tuple(islice(self.free, -(-tokens // self.page_tokens)))

    def run(self, *sequences: Sequence, model: str | None = None) -> tuple[Row, ...]:
        return self.driver.run(Batch(model=model or self.model, sequences=sequences)).result(120)

    def feed(self, tokens: tuple[int, ...], pages: tuple[int, ...], position: int = 0, **fields: Any) -> Sequence:
        fields = {"pid": 1, "salt": 0, "sample": GREEDY, **fields}
        return Sequence(tokens=tokens, position=position, pages=pages, **fields)

    def guess(
        self, tokens: tuple[int, ...], pages: tuple[int, ...], pid: int, samples: list[Sample], guesses: list[int]
    ) -> Sequence:
        """`tokens` from the beginning, and what may come next."""
        pairs = tuple(Guess(token, sample) for token, sample in zip(guesses, samples[1:], strict=False))
        return self.feed(tokens, pages, pid=pid, sample=samples[0], guesses=pairs)

    def answer(self, prompt: tuple[int, ...], count: int, sample: Sample = GREEDY) -> list[int]:
        """What a lone process answers: the prompt at once, then token by token."""
        pages = self.pages(len(prompt) + count)
        tokens = list(prompt)
        fed = 0
        for _ in range(count):
            (row,) = self.run(self.feed(tuple(tokens[fed:]), pages, fed, sample=sample))
            assert isinstance(row, Sampled)
            fed = len(tokens)
            tokens.append(row.token)
        return tokens[len(prompt) :]


def token(row: Row) -> int:
    assert isinstance(row, Sampled)
    return row.token


def decoded(bench: Bench, samples: list[Sample]) -> tuple[list[Sampled], tuple[int, ...]]:
    """What a lone process answers to PROMPT, token by token, and other pages with room for as much."""
    pages = bench.pages(len(PROMPT) + len(samples))
    rows: list[Sampled] = []
    fed, position = PROMPT, 0
    for sample in samples:
        (row,) = bench.run(bench.feed(fed, pages, position, sample=sample))
        assert isinstance(row, Sampled)
        rows.append(row)
        position += len(fed)
        fed = (row.token,)
    return rows, bench.pages(len(PROMPT) + len(samples))


def prefilled(bench: Bench) -> tuple[Row, tuple[int, ...]]:
    """Pages that hold PROMPT, and what `continued` answers from them."""
    pages = bench.pages(len(PROMPT) + 2)
    bench.run(bench.feed(PROMPT, pages))
    return continued(bench, pages), pages


def continued(bench: Bench, pages: tuple[int, ...], model: str | None = None) -> Row:
    """The row after one more token, computed from the KV in `pages` and nothing else."""
    (row,) = bench.run(bench.feed((7,), pages, len(PROMPT), sample=Sample(uniform=0.5, logprobs=5)), model=model)
    assert isinstance(row, Sampled)
    return row
