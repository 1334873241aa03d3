"""Answers under a grammar in a kernel on the sim driver: the same alone, in company, when pages are taken, forked,
held, and in the kernel's next life. The sim driver makes a token of what a process has read and of what its mask
allows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import llm_os
from llm_os.drivers.sim import SimImage, reference
from llm_os.kernel.constraint import Compiled, Constraint
from llm_os.kernel.driver import Sample
from llm_os.kernel.process import salt_of
from llm_os.kernel.random import uniform
from llm_os.plugins.grammar.plugin import GrammarPlugin

MODEL = "sim:a?layers=2&kv_bytes_per_token=8192"
PATTERN = r"([a-f]{3} [0-9]{2},){10,20}end"
END = 256


def ask(
    pattern: str | None = PATTERN, prompt: str = "The quick brown fox. ", seed: int = 1, **fields: Any
) -> llm_os.Request:
    grammar = None if pattern is None else llm_os.Grammar(kind="regex", source=pattern)
    sampling = {"max_tokens": 200, "temperature": 1.0, "seed": seed, "grammar": grammar, **fields.pop("sampling", {})}
    return llm_os.Request(model=MODEL, prompt=prompt, sampling=llm_os.Sampling(**sampling), **fields)


def boot(**fields: Any) -> llm_os.Kernel:
    return llm_os.Kernel(llm_os.Config(**{"driver": "sim", "memory": "64MiB", "frame_size": "64KiB", **fields}))


def answer(kernel: llm_os.Kernel, *requests: llm_os.Request) -> list[llm_os.Completion]:
    """All at once."""

    async def collect() -> None:
        async with anyio.create_task_group() as tasks:
            for n, request in enumerate(requests):
                tasks.start_soon(one, n, request)

    async def one(n: int, request: llm_os.Request) -> None:
        completions[n] = await kernel.generate(request)

    completions: dict[int, llm_os.Completion] = {}
    anyio.run(collect)
    return [completions[n] for n in range(len(requests))]


@pytest.fixture
def kernel() -> Iterator[llm_os.Kernel]:
    with boot() as kernel:
        yield kernel


def test_an_answer_matches_and_is_what_one_process_alone_would_say(kernel: llm_os.Kernel) -> None:
    request = ask(seed=7)
    (said,) = answer(kernel, request)
    assert re.fullmatch(PATTERN, said.text) and said.finish_reason == "stop"
    plugin, image = GrammarPlugin(), SimImage.parse(MODEL)
    assert request.sampling.grammar is not None and isinstance(request.prompt, str)
    constraint = Constraint(
        Compiled(plugin.compile_grammar(request.sampling.grammar, image)), image, image.text_end_tokens
    )
    plugin.halting()
    prompt, tokens = [*request.prompt.encode()], []

    def samples() -> Iterator[Sample]:
        while True:
            yield Sample(
                uniform=uniform(7, len(prompt) + len(tokens)), temperature=1.0, mask=constraint.mask(tuple(tokens))
            )

    for token in reference(image, salt_of(""), prompt, samples()):
        tokens.append(token)
    assert said.token_ids == tuple(tokens)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
def test_penalties_and_biases_choose_among_what_is_allowed_only(kernel: llm_os.Kernel, temperature: float) -> None:
    biases = {ord("z"): 1000.0, END: 1000.0, ord("a"): -1000.0}
    options = {"temperature": temperature, "logit_bias": biases, "presence_penalty": 2.0, "repetition_penalty": 1.5}
    (said,) = answer(kernel, ask(sampling=options))
    assert re.fullmatch(PATTERN, said.text)


def test_an_answer_that_is_cut_is_the_beginning_of_the_whole_one(kernel: llm_os.Kernel) -> None:
    (whole,) = answer(kernel, ask())
    (cut,) = answer(kernel, ask(sampling={"max_tokens": 20}))
    assert cut.finish_reason == "length" and cut.token_ids == whole.token_ids[:20]


def test_answers_are_the_same_in_company_and_neighbours_do_not_see_it(kernel: llm_os.Kernel) -> None:
    requests = [ask(seed=1), ask(None, seed=2, sampling={"max_tokens": 80}), ask("[xyz]{50}", seed=3), ask(seed=4)]
    lone = [answer(kernel, request)[0].token_ids for request in requests]
    assert [said.token_ids for said in answer(kernel, *requests)] == lone


def test_every_sample_of_a_request_has_its_own_place_in_the_grammar(kernel: llm_os.Kernel) -> None:
    async def collect() -> list[llm_os.Completion]:
        return [await stream.collect() for stream in kernel.samples(ask(seed=10), 5)]

    said = anyio.run(collect)
    assert all(re.fullmatch(PATTERN, completion.text) for completion in said)
    assert len({completion.text for completion in said}) == 5
    for n, completion in enumerate(said):
        assert completion.token_ids == answer(kernel, ask(seed=10 + n))[0].token_ids


def test_a_fork_goes_on_in_the_grammar_from_where_its_parent_is(kernel: llm_os.Kernel) -> None:
    async def fork() -> list[llm_os.Completion]:
        parent = kernel.stream(ask(r"[a-f]{300}[0-9]{4}", sampling={"max_tokens": 400}))
        await anext(aiter(parent))
        await kernel.block(parent.pid)
        child = kernel.fork(parent.pid)
        await kernel.unblock(parent.pid)
        return [await parent.collect(), await child.collect()]

    for said in anyio.run(fork):
        assert re.fullmatch(r"[a-f]{300}[0-9]{4}", said.text) and said.finish_reason == "stop"


@pytest.mark.parametrize("swap", ["0", "1MiB"])
def test_whose_pages_are_taken_says_the_same(kernel: llm_os.Kernel, swap: str) -> None:
    requests = [ask(prompt=f"{n} bottles of milk on the wall. ", seed=n) for n in range(8)]
    roomy = [said.token_ids for said in answer(kernel, *requests)]
    fed = 0
    with boot(memory="4MiB", swap_host=swap, prefix_cache=False) as crowded:  # KV for two and a half of the eight
        driver = crowded._loop.driver
        run, out, swaps = driver.run, driver.swap_out, []

        def count(batch: llm_os.Batch) -> Any:
            nonlocal fed
            fed += sum(len(sequence.tokens) for sequence in batch.sequences)
            return run(batch)

        driver.run = count  # type: ignore[method-assign]
        driver.swap_out = lambda *call: (swaps.append(call), out(*call))[1]  # type: ignore[method-assign, func-returns-value]
        assert [said.token_ids for said in answer(crowded, *requests)] == roomy
    needed = sum(len(request.prompt or "") + len(tokens) - 1 for request, tokens in zip(requests, roomy, strict=True))
    assert swaps or fed > needed, "nobody's pages were taken"
    assert bool(swaps) == (swap != "0")


def test_a_session_goes_on_under_its_grammar_in_the_kernels_next_life(kernel: llm_os.Kernel, tmp_path: Path) -> None:
    request = ask(r"[a-f]{1500}[0-9]{4}", sampling={"max_tokens": 2000})
    (whole,) = answer(kernel, request)
    assert re.fullmatch(r"[a-f]{1500}[0-9]{4}", whole.text)
    with boot(state=tmp_path) as first:
        stream = first.stream(request)
        assert next(iter(stream)).finish_reason is None
    with boot(state=tmp_path, plugins=("-grammar",)) as without, pytest.raises(llm_os.RequestError, match="no plugin"):
        anyio.run(without.attach(stream.pid).collect)
    with boot(state=tmp_path) as second:
        assert second.recovered == (stream.pid,)
        assert anyio.run(second.attach(stream.pid).collect).token_ids == whole.token_ids


def test_each_turn_of_a_held_process_is_an_answer_of_its_own(kernel: llm_os.Kernel) -> None:
    async def two_turns() -> str:
        stream = kernel.stream(ask("[a-f]{5}[0-9]", hold=True))
        async for chunk in stream:
            if chunk.waiting and not turns:
                turns.append(1)
                await kernel.unblock(stream.pid, [*b" and then? "])
            elif chunk.waiting:
                await kernel.finish(stream.pid)
        assert stream.completion is not None
        return stream.completion.text

    turns: list[int] = []
    assert re.fullmatch("[a-f]{5}[0-9][a-f]{5}[0-9]", anyio.run(two_turns))


@pytest.mark.parametrize("asks", [False, True])
def test_a_driver_that_does_not_obey_a_mask_cannot_answer_under_a_grammar(
    monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    def choose(digest: int, sample: Sample, end_after: int) -> int:
        if asks and sample.mask is not None:
            sample.mask.bits()
        return ord("!")

    monkeypatch.setattr("llm_os.drivers.sim.choose", choose)
    with boot() as kernel:
        with pytest.raises(llm_os.DriverError, match="chose a token that the grammar does not allow"):
            anyio.run(kernel.generate, ask())
        assert answer(kernel, ask(None, sampling={"max_tokens": 3}))[0].text == "!!!"


def test_a_grammar_that_is_wrong_ends_its_request_only(kernel: llm_os.Kernel) -> None:
    with pytest.raises(llm_os.RequestError, match="the regular expression cannot be used: unclosed group"):
        anyio.run(kernel.generate, ask("(a"))
    assert answer(kernel, ask("yes"))[0].text == "yes"
    assert not kernel.ps()
