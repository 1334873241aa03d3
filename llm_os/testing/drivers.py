"""The driver contract as tests: what the kernel relies on, in words that every device understands.

Each case speaks only to `kernel/driver.py`: it loads a model, lays out pages as the kernel would, and compares what a
batch answers with what a lone process answers. Takes a few seconds on a driver that is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, ClassVar

import pytest
from msgspec import structs

from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, DeviceMemory, Driver, Move, Row, Sample, Sampled
from llm_os.kernel.errors import Closed, DriverError
from llm_os.kernel.image import Image
from llm_os.testing.bench import GREEDY, PROMPT, Bench, continued, decoded, prefilled, token


class DriverConformance:
    """Inherit from it, and say what is to be tested:

    class TestMine(llm_os.testing.DriverConformance):
        def make(self, config): return MyDriver(config)

    `model` is one that the driver can run, with 256 tokens or more in its vocabulary, and with other answers at a
    temperature of 1.5 than the greedy one.
    """

    config: ClassVar[Config] = Config(memory="2GiB", precision="exact")
    model: ClassVar[str] = "sim:conformance"

    def make(self, config: Config) -> Driver:
        """A new driver, open."""
        raise NotImplementedError(f"{type(self).__name__} has to say which driver it tests: def make(self, config)")

    def image(self) -> Image:
        """`model`, opened: with your own `open_image`, where no built-in plugin knows it."""
        import llm_os

        return llm_os.open_image(self.model)

    @pytest.fixture(scope="class")
    @classmethod
    def bench(cls) -> Iterator[Bench]:
        suite = cls()
        with closing(suite.image()) as image, closing(suite.make(cls.config)) as driver:
            yield Bench(driver, cls.config, image, cls.model)

    def test_a_prompt_in_any_chunks_gives_the_same_answer(self, bench: Bench) -> None:
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
    def test_rows_do_not_see_their_company(self, bench: Bench, company: int) -> None:
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

    def test_a_token_computed_again_in_a_prefill_is_the_one_that_was_decoded(self, bench: Bench) -> None:
        answer = bench.answer(PROMPT, 8)
        for kept in range(1, 8):
            assert bench.answer((*PROMPT, *answer[:kept]), 1) == answer[kept : kept + 1]

    def test_guesses_bring_the_tokens_that_would_have_come_one_by_one(self, bench: Bench) -> None:
        """Greedy and sampled, with log-probabilities; a guess that is wrong changes nothing of what follows."""
        for temperature in (0.0, 1.5):
            samples = [Sample(uniform=n / 7, temperature=temperature, logprobs=3) for n in range(6)]
            expected, pages = decoded(bench, samples)
            answer = [row.token for row in expected]
            for right in range(6):
                wrong = [(token + 1) % 256 for token in answer[right:5]]
                (row,) = bench.run(bench.guess(PROMPT, pages, 0, samples, [*answer[:right], *wrong]))
                assert isinstance(row, Sampled)
                assert [structs.replace(row, more=()), *row.more][: right + 1] == expected[
                    : 1 + min(right, len(row.more))
                ]
                if 0 < right < 5:  # from what was right it goes on as if nothing had been guessed
                    rest = (*answer[:right],)
                    (row,) = bench.run(bench.feed(rest, pages, len(PROMPT), sample=samples[right]))
                    assert row == expected[right], f"after {right} right guesses"

    def test_guesses_are_not_seen_by_their_company(self, bench: Bench) -> None:
        sample = Sample(uniform=0.5, logprobs=3)
        expected, pages = decoded(bench, [sample] * 4)
        answer = [row.token for row in expected]
        alone = bench.run(bench.guess(PROMPT, pages, 0, [sample] * 4, answer[:3]))
        prompts = [tuple(range(40 + n, 60 + 3 * n)) for n in range(7)]
        lone = [bench.run(bench.feed(prompt, bench.pages(90), sample=sample))[0] for prompt in prompts]
        batch = [
            bench.guess(prompt, bench.pages(90), n, [sample] * 3, [7, 8])
            if n % 2
            else bench.feed(prompt, bench.pages(90), pid=n, sample=sample)
            for n, prompt in enumerate(prompts, 2)
        ]
        rows = bench.run(*batch, bench.guess(PROMPT, bench.pages(90), 1, [sample] * 4, answer[:3]))
        assert rows[-1:] == alone, "bit for bit"
        assert [structs.replace(row, more=()) if isinstance(row, Sampled) else row for row in rows[:-1]] == lone

    def test_pages_may_lie_anywhere_in_any_order(self, bench: Bench) -> None:
        expected = bench.answer(PROMPT, 1)
        pages = bench.pages(len(PROMPT) * 4)
        scattered = tuple(reversed(pages[::2]))
        (row,) = bench.run(bench.feed(PROMPT, scattered))
        assert token(row) == expected[0]

    def test_a_copied_page_serves_as_the_original(self, bench: Bench) -> None:
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

    def test_stale_cells_beyond_the_end_are_not_read(self, bench: Bench) -> None:
        pages = bench.pages(2 * len(PROMPT))
        bench.run(bench.feed(PROMPT + PROMPT, pages))
        (row,) = bench.run(bench.feed(PROMPT[:20], pages))
        assert token(row) == bench.answer(PROMPT[:20], 1)[0]

    def test_sampling_is_a_function_of_the_uniform(self, bench: Bench) -> None:
        samples = [Sample(uniform=n / 8, temperature=1.5) for n in range(8)]
        first = [bench.answer(PROMPT, 1, sample)[0] for sample in samples]
        rows = bench.run(
            *(bench.feed(PROMPT, bench.pages(len(PROMPT)), pid=n, sample=sample) for n, sample in enumerate(samples))
        )
        assert [token(row) for row in rows] == first
        assert len(set(first)) > 1

    def test_logprobs_are_reported_as_asked(self, bench: Bench) -> None:
        for count in (0, 1, 20):
            (row,) = bench.run(bench.feed(PROMPT, bench.pages(60), sample=Sample(uniform=0.5, logprobs=count)))
            assert isinstance(row, Sampled) and row.logprob is not None and row.logprob <= 0
            assert len(row.top) <= count
            assert sorted(row.top, key=lambda pair: -pair[1]) == list(row.top)

    def test_an_unknown_model_fails_the_operation_and_nothing_else(self, bench: Bench) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: bench.driver.run(Batch(model="nobody", sequences=(bench.feed((1,), (0,)),))),
            lambda: bench.driver.unload("nobody"),
            lambda: bench.driver.copy("nobody", (Move(0, 1),)),
            lambda: bench.driver.swap_out("nobody", (0,)),
            lambda: bench.driver.swap_in("nobody", (0,), (b"",)),
            lambda: bench.driver.load(bench.model, bench.image, bench.placement),
        ]
        for call in calls:
            with pytest.raises(DriverError):
                call().result(60)
        assert bench.answer(PROMPT, 1) == bench.answer(PROMPT, 1)

    def test_the_device_says_what_it_is_and_holds(self, bench: Bench) -> None:
        info = bench.driver.info()
        assert info.unavailable is None and info.device and info.total_bytes >= info.free_bytes > 0
        cost = bench.driver.footprint(bench.image, 512)
        frames = sum(extent.frames for extent in bench.placement.extents[:-1])
        assert bench.driver.memory().weights <= sum(cost.extents) <= frames * bench.frame_bytes

    def test_unload_gives_back_and_load_brings_back(self, bench: Bench) -> None:
        expected = bench.answer(PROMPT, 3)
        with bench.unloaded():
            assert bench.driver.memory().weights == 0
        assert bench.answer(PROMPT, 3) == expected

    def test_kv_outlives_its_models_weights(self, bench: Bench) -> None:
        expected, pages = prefilled(bench)
        with bench.unloaded():
            pass
        assert continued(bench, pages) == expected

    def test_pages_are_copied_and_swapped_while_their_model_is_not_loaded(self, bench: Bench) -> None:
        expected, pages = prefilled(bench)
        copies, third = bench.pages(len(PROMPT) + 2), bench.pages(len(PROMPT) + 2)
        with bench.unloaded():
            bench.driver.copy(bench.model, tuple(map(Move, pages, copies))).result(60)
            contents = bench.driver.swap_out(bench.model, copies).result(60)
            bench.driver.swap_in(bench.model, third, contents).result(60)
        for table in (copies, third, pages):
            assert continued(bench, table) == expected

    def test_swapped_pages_serve_in_other_places_as_they_did(self, bench: Bench) -> None:
        expected, pages = prefilled(bench)
        contents = bench.driver.swap_out(bench.model, pages).result(60)
        assert len(contents) == len(pages)
        assert all(0 < len(content) <= bench.page_bytes for content in contents)
        bench.run(bench.feed(tuple(reversed(PROMPT)) + PROMPT[:2], pages))
        others = tuple(reversed(bench.pages(2 * len(PROMPT))))[: len(pages)]
        bench.driver.swap_in(bench.model, others, contents).result(60)
        assert continued(bench, others) == expected
        bench.driver.swap_in(bench.model, pages, contents).result(60)
        assert continued(bench, pages) == expected

    def test_a_swap_that_does_not_fit_writes_nothing(self, bench: Bench) -> None:
        expected, pages = prefilled(bench)
        others = bench.pages(len(PROMPT) + 2)
        bench.run(bench.feed(tuple(reversed(PROMPT)) + PROMPT[:2], others))
        junk = bench.driver.swap_out(bench.model, others).result(60)
        for contents in (junk[:-1], (*junk, junk[0]), (*junk[:-1], junk[-1][:-1]), (*junk[:-1], junk[-1] * 2)):
            with pytest.raises(DriverError):
                bench.driver.swap_in(bench.model, pages, contents).result(60)
        for outside in (-1, bench.placement.pages):
            with pytest.raises(DriverError):
                bench.driver.swap_in(bench.model, (*pages[:-1], outside), junk).result(60)
            with pytest.raises(DriverError):
                bench.driver.swap_out(bench.model, (*pages[:-1], outside)).result(60)
        assert continued(bench, pages) == expected

    def test_release_gives_the_kv_back_and_ends_it(self, bench: Bench) -> None:
        expected, pages = prefilled(bench)
        contents = bench.driver.swap_out(bench.model, pages).result(60)
        with pytest.raises(DriverError):
            bench.driver.release(bench.model).result(60)
        assert continued(bench, pages) == expected, "a loaded model keeps its KV"
        with bench.unloaded():
            bench.driver.release(bench.model).result(60)
            assert bench.driver.memory() == DeviceMemory(weights=0, kv=0)
            calls: list[Callable[[], Any]] = [
                lambda: bench.driver.swap_out(bench.model, pages),
                lambda: bench.driver.swap_in(bench.model, pages, contents),
                lambda: bench.driver.copy(bench.model, (Move(pages[0], pages[1]),)),
            ]
            for call in calls:
                with pytest.raises(DriverError):
                    call().result(60)
            bench.driver.release(bench.model).result(60)
            bench.driver.release("nobody").result(60)
        bench.run(bench.feed(PROMPT, pages))
        assert continued(bench, pages) == expected

    def test_kept_kv_is_not_cut_in_another_way(self, bench: Bench) -> None:
        expected, pages = prefilled(bench)
        with bench.unloaded():
            fewer = structs.replace(bench.placement, pages=bench.placement.pages - 1)
            other = structs.replace(bench.placement, page_tokens=bench.page_tokens + 1)
            for placement in (fewer, other):
                with pytest.raises(DriverError):
                    bench.driver.load(bench.model, bench.image, placement).result(120)
            assert bench.driver.memory().weights == 0
        assert continued(bench, pages) == expected

    def test_frames_pass_to_another_models_pages_and_back(self, bench: Bench) -> None:
        expected, pages = prefilled(bench)
        held = bench.driver.memory().kv
        with bench.other(bench.place(sum(bench.sizes))) as other:
            for model in (other, bench.model, other):
                bench.run(bench.feed(PROMPT, pages), model=model)
                assert continued(bench, pages, model) == expected
                assert bench.driver.memory().kv <= held, "one memory, whoever writes it"
        bench.run(bench.feed(PROMPT, pages))
        assert continued(bench, pages) == expected

    def test_frames_pass_to_weights_and_back(self, bench: Bench) -> None:
        expected, pages = prefilled(bench)
        held = bench.driver.memory().kv
        placement = bench.place(min(min(pages) // bench.slots, bench.frames - sum(bench.sizes)))
        extents = placement.extents
        assert all(any(e.frame <= page // bench.slots < e.frame + e.frames for e in extents) for page in pages)
        with bench.other(placement):
            assert bench.driver.memory().kv <= held
        bench.run(bench.feed(PROMPT, pages))
        assert continued(bench, pages) == expected

    def test_prefetch_takes_no_memory_of_the_device(self, bench: Bench) -> None:
        held = bench.driver.memory()
        bench.driver.prefetch("other", bench.image).result(120)
        bench.driver.prefetch(bench.model, bench.image).result(120)
        assert bench.driver.memory() == held
        with pytest.raises(DriverError):
            bench.driver.unload("other").result(60)

    def test_close_is_final_and_can_be_repeated(self, bench: Bench) -> None:
        driver = self.make(self.config)
        driver.close()
        driver.close()
        with pytest.raises(Closed):
            driver.unload(bench.model).result(60)
