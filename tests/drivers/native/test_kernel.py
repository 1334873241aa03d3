"""Fast mode through the kernel, on the real model: an answer does not depend on a request's company, on how its prompt
is cut, or on being preempted and swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_os
from llm_os.drivers.formats.image import open_image
from llm_os.drivers.native.footprint import measure_native
from llm_os.drivers.torch.driver import TorchDriver

TEXTS = ["The capital of France is", "def fibonacci(n):\n    if n < 2:\n", "Wer reitet so spät durch", "1, 2, 3, 5, 8,"]
PROMPTS = [f"{number}. {TEXTS[number % 4]} {'and so on ' * (number % 5)}" for number in range(32)]
TOKENS = 8
FRAME = 2 << 20
SHARED = "The licensor grants you a licence. " * 12


def config(memory: int = 1024 << 20, **fields: Any) -> llm_os.Config:
    return llm_os.Config(driver="cpu", memory=memory, threads=2, speculation="off", **fields)


def ask(kernel: llm_os.Kernel, model: Path, prompt: str) -> llm_os.Stream:
    sampling = llm_os.Sampling(max_tokens=TOKENS, temperature=0.0)
    return kernel.stream(llm_os.Request(model=str(model), prompt=prompt, sampling=sampling))


@pytest.fixture(scope="module")
def kernel() -> Iterator[llm_os.Kernel]:
    with llm_os.Kernel(config()) as kernel:
        yield kernel


@pytest.fixture(scope="module")
def alone(kernel: llm_os.Kernel, smollm2: Path) -> list[tuple[int, ...]]:
    """What each of PROMPTS answers when nobody else is there."""
    return [ask(kernel, smollm2, prompt).result().token_ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def room(smollm2: Path) -> Callable[[int, int], int]:
    """room(batch_tokens, frames): bytes for the model, and so many frames of KV."""

    def count(batch_tokens: int, frames: int) -> int:
        image = open_image(smollm2)
        cost = measure_native(image.hyperparameters, image.weights, batch_tokens, torch.get_num_threads())
        image.close()
        return sum(-(-size // FRAME) for size in (*cost.extents, cost.workspace)) * FRAME + frames * FRAME

    return count


@pytest.mark.parametrize("size", [2, 5, 16, 32])
def test_requests_together_answer_as_each_alone(kernel, smollm2, alone, size) -> None:
    streams = []
    for prompt in PROMPTS[-size:]:
        streams.append(ask(kernel, smollm2, prompt))
        if len(streams) % 5 == 1:
            next(streams[-1])  # it gets on while the others come
    assert [stream.result().token_ids for stream in streams] == alone[-size:]


@pytest.mark.parametrize("batch_tokens", [7, 33])
def test_prompts_cut_anywhere_and_shared_pages_answer_as_whole_ones(smollm2, kernel, alone, batch_tokens) -> None:
    shared = ask(kernel, smollm2, SHARED).result().token_ids
    with llm_os.Kernel(config(batch_tokens=batch_tokens, page_tokens=48)) as small:
        streams = [ask(small, smollm2, prompt) for prompt in (SHARED, *PROMPTS[:12])]
        next(streams[0])
        assert small.fork(streams[0].pid).result().token_ids == shared
        assert [stream.result().token_ids for stream in streams] == [shared, *alone[:12]]
        assert ask(small, smollm2, SHARED).result().token_ids == shared  # of which most is cached


@pytest.mark.parametrize(
    "swap", [{}, {"swap_host": "64MiB"}, {"swap_disk": "64MiB"}], ids=["recomputed", "host", "disk"]
)
def test_preempted_requests_answer_as_if_they_had_not_been(smollm2, alone, room, swap, monkeypatch) -> None:
    fed, moved = [], []
    run, swap_in = TorchDriver.run, TorchDriver.swap_in

    def count_run(driver: TorchDriver, batch: llm_os.Batch) -> Any:
        fed.extend(len(sequence.tokens) for sequence in batch.sequences)
        return run(driver, batch)

    def count_in(driver: TorchDriver, model: str, pages: tuple[int, ...], contents: tuple[bytes, ...]) -> Any:
        moved.extend(pages)
        return swap_in(driver, model, pages, contents)

    monkeypatch.setattr(TorchDriver, "run", count_run)
    monkeypatch.setattr(TorchDriver, "swap_in", count_in)
    with llm_os.Kernel(config(room(64, 3), batch_tokens=64, page_tokens=16, prefix_cache=False, **swap)) as small:
        answers = [stream.result() for stream in [ask(small, smollm2, prompt) for prompt in PROMPTS]]
    assert [answer.token_ids for answer in answers] == alone
    needed = sum(answer.usage.prompt_tokens + answer.usage.completion_tokens - 1 for answer in answers)
    assert len(moved) > 5 if swap else sum(fed) > needed + 50  # they really were preempted
