"""The driver contract, run against every driver. A driver author runs the same cases against their own.

Each case speaks only to `kernel/driver.py`: it loads a model, lays out pages as the kernel would, and compares what a
batch answers with what a lone process answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_os.drivers.plugin import register_drivers
from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, Driver, DriverProbe, Move, Placement, Row, Sample, Sampled, Sequence
from llm_os.kernel.errors import Closed, DriverError
from llm_os.kernel.image import Image
from llm_os.kernel.memory import Memory, fit_page_tokens
from llm_os.kernel.plugins import Plugins

PROBES: dict[str, DriverProbe] = {}
register_drivers(lambda name, factory, probe: PROBES.__setitem__(name, probe))
GREEDY = Sample(uniform=0.5)
PROMPT = tuple(range(40, 90))


class Bench:
    """One driver with one model loaded, and a page allocator as plain as can be."""

    def __init__(self, driver: str, image: Image, model: str) -> None:
        config = Config(driver=driver, memory="2GiB", precision="exact")
        self.driver: Driver = Plugins(config).open_driver()
        self.image, self.model = image, model
        cost = self.driver.footprint(image, 512)
        memory = Memory(config.budget(0), config.frame_bytes)
        extents = memory.claim_extents(model, (*cost.extents, cost.workspace))
        self.page_tokens = fit_page_tokens(cost.page_tokens, cost.kv_bytes_per_token, config.frame_bytes) or 0
        self.slab = memory.open_slab(model, self.page_tokens, self.page_tokens * cost.kv_bytes_per_token)
        self.placement = Placement(extents=extents, page_tokens=self.page_tokens, pages=memory.frames * self.slab.slots)
        self.driver.load(model, image, self.placement).result(120)

    def pages(self, tokens: int) -> tuple[int, ...]:
        pages = [self.slab.allocate() for _ in range(-(-tokens // self.page_tokens))]
        assert None not in pages
        return tuple(page for page in pages if page is not None)

    def run(self, *sequences: Sequence) -> tuple[Row, ...]:
        return self.driver.run(Batch(model=self.model, sequences=sequences)).result(120)

    def feed(self, tokens: tuple[int, ...], pages: tuple[int, ...], position: int = 0, **fields: Any) -> Sequence:
        fields = {"pid": 1, "salt": 0, "sample": GREEDY, **fields}
        return Sequence(tokens=tokens, position=position, pages=pages, **fields)

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


@pytest.fixture(scope="module", params=sorted(PROBES))
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    name = request.param
    if why := PROBES[name]().unavailable:
        pytest.skip(f"{name}: {why}")
    if name == "sim":
        model = "sim:conformance"
    else:
        path: Path = request.getfixturevalue("smollm2")
        model = str(path)
    image = Plugins(Config(driver=name)).open_image(model)
    bench = Bench(name, image, model)
    yield bench
    bench.driver.close()
    image.close()


def token(row: Row) -> int:
    assert isinstance(row, Sampled)
    return row.token


def test_a_prompt_in_any_chunks_gives_the_same_answer(bench: Bench) -> None:
    expected = bench.answer(PROMPT, 4)
    for chunk in (1, 7, 16, 33):
        pages = bench.pages(len(PROMPT) + 4)
        row: Row = None
        for start in range(0, len(PROMPT), chunk):
            part = PROMPT[start : start + chunk]
            last = start + len(part) == len(PROMPT)
            (row,) = bench.run(bench.feed(part, pages, start, sample=GREEDY if last else None))
            assert (row is None) == (not last)
        assert token(row) == expected[0], f"chunks of {chunk}"


@pytest.mark.parametrize("company", [1, 7, 15])
def test_rows_do_not_see_their_company(bench: Bench, company: int) -> None:
    prompts = [tuple(range(40 + n, 60 + 3 * n)) for n in range(company + 1)]
    alone = [bench.answer(prompt, 1)[0] for prompt in prompts]
    batch = [
        bench.feed(prompt, bench.pages(len(prompt) + 1), pid=n, sample=Sample(uniform=0.5, logprobs=3))
        for n, prompt in enumerate(prompts)
    ]
    rows = bench.run(*batch)
    assert [token(row) for row in rows] == alone
    lone = bench.run(bench.feed(prompts[-1], bench.pages(100), sample=Sample(uniform=0.5, logprobs=3)))
    assert lone[0] == rows[-1], "logprobs are equal bit for bit"


def test_a_token_computed_again_in_a_prefill_is_the_one_that_was_decoded(bench: Bench) -> None:
    answer = bench.answer(PROMPT, 8)
    for kept in range(1, 8):
        assert bench.answer((*PROMPT, *answer[:kept]), 1) == answer[kept : kept + 1]


def test_pages_may_lie_anywhere_in_any_order(bench: Bench) -> None:
    expected = bench.answer(PROMPT, 1)
    pages = bench.pages(len(PROMPT) * 4)
    scattered = tuple(reversed(pages[::2]))
    (row,) = bench.run(bench.feed(PROMPT, scattered))
    assert token(row) == expected[0]


def test_a_copied_page_serves_as_the_original(bench: Bench) -> None:
    expected = bench.answer(PROMPT, 2)
    pages = bench.pages(len(PROMPT) + 2)
    bench.run(bench.feed(PROMPT, pages))
    copies = bench.pages(len(PROMPT) + 2)
    moves = tuple(Move(source, target) for source, target in zip(pages, copies, strict=True))
    bench.driver.copy(bench.model, moves).result(60)
    other = tuple(reversed(PROMPT))
    bench.run(bench.feed(other, pages))
    (row,) = bench.run(bench.feed((expected[0],), copies, len(PROMPT)))
    assert token(row) == expected[1]


def test_stale_cells_beyond_the_end_are_not_read(bench: Bench) -> None:
    pages = bench.pages(2 * len(PROMPT))
    bench.run(bench.feed(PROMPT + PROMPT, pages))
    (row,) = bench.run(bench.feed(PROMPT[:20], pages))
    assert token(row) == bench.answer(PROMPT[:20], 1)[0]


def test_sampling_is_a_function_of_the_uniform(bench: Bench) -> None:
    samples = [Sample(uniform=n / 8, temperature=1.5) for n in range(8)]
    first = [bench.answer(PROMPT, 1, sample)[0] for sample in samples]
    rows = bench.run(
        *(bench.feed(PROMPT, bench.pages(len(PROMPT)), pid=n, sample=sample) for n, sample in enumerate(samples))
    )
    assert [token(row) for row in rows] == first
    assert len(set(first)) > 1


def test_logprobs_are_reported_as_asked(bench: Bench) -> None:
    for count in (0, 1, 20):
        (row,) = bench.run(bench.feed(PROMPT, bench.pages(60), sample=Sample(uniform=0.5, logprobs=count)))
        assert isinstance(row, Sampled) and row.logprob is not None and row.logprob <= 0
        assert len(row.top) <= count
        assert sorted(row.top, key=lambda pair: -pair[1]) == list(row.top)


def test_an_unknown_model_fails_the_operation_and_nothing_else(bench: Bench) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: bench.driver.run(Batch(model="nobody", sequences=(bench.feed((1,), (0,)),))),
        lambda: bench.driver.unload("nobody"),
        lambda: bench.driver.copy("nobody", (Move(0, 1),)),
        lambda: bench.driver.load(bench.model, bench.image, bench.placement),
    ]
    for call in calls:
        with pytest.raises(DriverError):
            call().result(60)
    assert bench.answer(PROMPT, 1) == bench.answer(PROMPT, 1)


def test_the_device_says_what_it_is_and_holds(bench: Bench) -> None:
    info = bench.driver.info()
    assert info.unavailable is None and info.device and info.total_bytes >= info.free_bytes > 0
    cost = bench.driver.footprint(bench.image, 512)
    frames = sum(extent.frames for extent in bench.placement.extents[:-1])
    assert bench.driver.memory().weights <= sum(cost.extents) <= frames * 2**21


def test_unload_gives_back_and_load_brings_back(bench: Bench) -> None:
    expected = bench.answer(PROMPT, 3)
    bench.driver.unload(bench.model).result(60)
    assert bench.driver.memory().weights == 0 and bench.driver.memory().kv == 0
    bench.driver.load(bench.model, bench.image, bench.placement).result(120)
    assert bench.answer(PROMPT, 3) == expected


def test_close_is_final_and_can_be_repeated(bench: Bench) -> None:
    config = Config(driver=bench.driver.info().driver, precision="exact")
    driver = Plugins(config).open_driver()
    driver.close()
    driver.close()
    with pytest.raises(Closed):
        driver.unload(bench.model).result(60)
