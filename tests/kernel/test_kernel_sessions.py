"""What a program can do with processes and models beyond asking: samples, tools, later lives, pins, limits, quotas."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import pytest

import llm_os
from llm_os.drivers.persistence import SlotStore
from llm_os.drivers.sim import SimDriver
from llm_os.kernel.driver import Batch

PROMPT = "The quick brown fox jumps over the lazy dog. " * 4
A = "sim:a"


def config(**fields: Any) -> llm_os.Config:
    return llm_os.Config(**{"driver": "sim", "memory": "64MiB", "frame_size": "64KiB", "page_tokens": 4, **fields})


def ask(prompt: str | list[int] = PROMPT, model: str = A, **fields: Any) -> llm_os.Request:
    names = ("max_tokens", "temperature", "seed")
    sampling = {"max_tokens": 20, "temperature": 0, **{n: fields.pop(n) for n in names if n in fields}}
    return llm_os.Request(model=model, prompt=prompt, sampling=llm_os.Sampling(**sampling), **fields)


def alone(request: llm_os.Request) -> tuple[int, ...]:
    """What a kernel answers that has nothing else to do."""
    with llm_os.Kernel(config(prefix_cache=False)) as kernel:
        return kernel.stream(request).result().token_ids


class Gate:
    """Holds back the batches of a sim driver: each runs when the test lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fed = 0  # tokens, in all batches
        self._passes = threading.Semaphore(0)
        self._waiting: list[tuple[SimDriver, Batch, Future[Any]]] = []
        self._arrived = threading.Condition()
        self.open = True
        run = SimDriver.run

        def held(driver: SimDriver, batch: Batch) -> Future[Any]:
            self.fed += sum(len(sequence.tokens) for sequence in batch.sequences)
            if self.open:
                return run(driver, batch)
            future: Future[Any] = Future()
            with self._arrived:
                self._waiting.append((driver, batch, future))
                self._arrived.notify_all()
            return future

        self._run = run
        monkeypatch.setattr(SimDriver, "run", held)

    def wait(self) -> None:
        """Until a batch is held back."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: self._waiting, timeout=30)

    def release(self) -> None:
        """Let the batches through, those to come too."""
        self.open = True
        with self._arrived:
            for driver, batch, future in self._waiting:
                future.set_result(self._run(driver, batch).result())
            self._waiting.clear()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.release()


def under_asyncio(call: Callable[..., Any], *arguments: Any) -> Any:
    return anyio.run(call, *arguments, backend="asyncio")


def under_trio(call: Callable[..., Any], *arguments: Any) -> Any:
    return anyio.run(call, *arguments, backend="trio")


def in_a_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    """Without a loop in this thread: the calls are made in one of another thread."""
    with anyio.from_thread.start_blocking_portal() as portal:
        return portal.call(call, *arguments)


@pytest.fixture(params=[under_asyncio, under_trio, in_a_thread])
def host(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_samples_compute_their_prompt_once_and_differ_by_seed(host: Any, gate: Gate) -> None:
    async def main() -> None:
        async with llm_os.Kernel(config()) as kernel:
            request = ask(temperature=1.0, seed=2**64 - 1)
            answers = [await stream.collect() for stream in kernel.samples(request, 3)]
            assert [answer.seed for answer in answers] == [2**64 - 1, 0, 1]
            assert len({answer.token_ids for answer in answers}) == 3
            assert [answer.usage.cached_tokens for answer in answers] == [0, len(PROMPT) - 1, len(PROMPT) - 1]
            assert gate.fed == len(PROMPT) + 2 + 3 * 19
            for answer in answers:
                assert answer.token_ids == alone(ask(temperature=1.0, seed=answer.seed))

    host(main)


def test_samples_hold_the_pages_of_their_prompt_once(gate: Gate) -> None:
    with llm_os.Kernel(config()) as kernel:
        streams = kernel.samples(ask(temperature=1.0, max_tokens=400), 8)
        for stream in streams:
            next(stream)
        gate.open = False
        gate.wait()
        infos, page = kernel.ps(), 4 * (1 << 14)
        shared, mapped = len(PROMPT) // 4 * page, sum(info.pages for info in infos) * page
        assert len(infos) == 8 and kernel.memory().kv == mapped - 7 * shared
        gate.release()
        for stream in streams:
            stream.close()


@pytest.mark.parametrize("damaged", [False, True])
def test_cached_tokens_are_those_that_were_not_computed_again(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Also where pages of the cache were swapped, and came back damaged."""
    get = SlotStore.get
    with llm_os.Kernel(config(memory="5632KiB", swap_host="4MiB")) as kernel:
        kernel.stream(ask(PROMPT[:40], max_tokens=1)).result()
        anyio.run(kernel.load, "sim:b?layers=5")
        assert kernel.memory().host > 0
        if damaged:
            monkeypatch.setattr(SlotStore, "get", lambda store, slot: get(store, slot) and None)
        gate.fed = 0
        answer = kernel.stream(ask(PROMPT[:60])).result()
        assert gate.fed == 60 - answer.usage.cached_tokens + 19
        assert (answer.usage.cached_tokens < 40) == damaged
        assert answer.token_ids == alone(ask(PROMPT[:60]))


@pytest.mark.parametrize("count", [0, 1025, True, "3"])
def test_a_number_of_samples_that_makes_no_sense_is_refused(count: Any) -> None:
    with llm_os.Kernel(config()) as kernel:
        if count is True:
            assert len(kernel.samples(ask(), count)) == 1
            return
        with pytest.raises(llm_os.RequestError, match="count"):
            kernel.samples(ask(), count)


def test_a_blocked_process_waits_and_goes_on_with_what_it_was_given(host: Any) -> None:
    gift = list(b" the tool said 42 ")

    async def main() -> None:
        async with llm_os.Kernel(config()) as kernel:
            stream = kernel.stream(ask(max_tokens=400))
            said = list((await anext(stream)).token_ids)
            await kernel.block(stream.pid, expected_s=60.0)
            [info] = kernel.ps()
            assert info.state == "blocked"
            with pytest.raises(llm_os.RequestError, match=rf"process {stream.pid} is blocked already"):
                await kernel.block(stream.pid)
            with pytest.raises(llm_os.RequestError, match="token id 257; the vocabulary of sim:a ends at 256"):
                await kernel.unblock(stream.pid, [257])
            other = await kernel.generate(ask("another", max_tokens=9))
            assert len(other.token_ids) == 9 and kernel.ps()[0].completion_tokens == info.completion_tokens
            await kernel.unblock(stream.pid, gift)
            with pytest.raises(llm_os.RequestError, match=rf"process {stream.pid} is not blocked"):
                await kernel.unblock(stream.pid)
            answer = await stream.collect()
            before = answer.token_ids[: info.completion_tokens]
            after = ask([*PROMPT.encode(), *before, *gift], max_tokens=400 - len(before))
            assert answer.token_ids[: len(said)] == tuple(said)
            assert answer.token_ids[len(before) :] == alone(after)
            assert answer.usage.prompt_tokens == len(PROMPT)
            for call in (kernel.block, kernel.unblock):
                with pytest.raises(llm_os.RequestError, match=f"there is no process {stream.pid}"):
                    await call(stream.pid)

    host(main)


def test_a_process_that_ends_before_it_could_stop_says_so_to_who_wanted_to_block_it(gate: Gate) -> None:
    with llm_os.Kernel(config()) as kernel:
        gate.open = False
        stream = kernel.stream(ask(max_tokens=1))
        gate.wait()
        asked = kernel._ask(lambda ticket: llm_os.kernel.events.Block(ticket, stream.pid))
        kernel.nice(stream.pid, 0)  # answered after what came before it
        gate.release()
        with pytest.raises(llm_os.RequestError, match=f"process {stream.pid} ended before it could be blocked"):
            asked.result(30)
        assert stream.result().finish_reason == "length"


def test_who_attaches_hears_a_session_of_an_earlier_life_from_its_first_token_on(host: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with llm_os.Kernel(config(state=tmp_path)) as first:
            expected = await first.generate(ask(max_tokens=300))
            stream = first.stream(ask(max_tokens=300))
            heard = (await anext(stream)).token_ids
        async with llm_os.Kernel(config(state=tmp_path)) as second:
            assert second.recovered == (stream.pid,)
            attached = second.attach(stream.pid)
            assert attached.pid == stream.pid
            with pytest.raises(llm_os.RequestError, match=rf"no unattached session {stream.pid}; recovered are \[\]"):
                second.attach(stream.pid)
            tokens = [token for chunk in [chunk async for chunk in attached] for token in chunk.token_ids]
            assert tuple(tokens) == expected.token_ids and expected.token_ids[: len(heard)] == heard
            assert attached.completion is not None and attached.completion.text == expected.text
            assert second.stream(ask()).pid > stream.pid
        async with llm_os.Kernel(config(state=tmp_path)) as third:
            assert stream.pid not in third.recovered

    host(main)


def test_a_pinned_model_stays_until_it_is_unpinned(host: Any) -> None:
    async def main() -> None:
        async with llm_os.Kernel(config(memory="6MiB")) as kernel:
            await kernel.load(A, pin=True)
            assert [model.pinned for model in kernel.models()] == [True]
            with pytest.raises(llm_os.Refused, match=r"sim:b needs .* unpin a model or raise memory"):
                await kernel.load("sim:b")
            with pytest.raises(llm_os.Refused, match="unpin a model or raise memory"):
                await kernel.generate(ask(model="sim:b"))
            await kernel.unpin(A)
            await kernel.load("sim:b")
            assert {model.name: model.where for model in kernel.models()} == {A: "on disk", "sim:b": "on device"}
            with pytest.raises(llm_os.ModelNotFound, match="sim:c is not open; load it first"):
                await kernel.unpin("sim:c")

    host(main)


def test_a_prefetched_model_is_near_and_takes_no_memory(host: Any) -> None:
    async def main() -> None:
        async with llm_os.Kernel(config()) as kernel:
            before = kernel.memory()
            await kernel.prefetch(A)
            while kernel.models()[0].where != "in host":
                await anyio.lowlevel.checkpoint()
            assert kernel.memory() == before
            assert len((await kernel.generate(ask())).token_ids) == 20

    host(main)


def test_a_deadline_ends_an_answer_with_what_there_is(host: Any) -> None:
    async def main() -> None:
        async with llm_os.Kernel(config()) as kernel:
            whole = await kernel.generate(ask(max_tokens=60, deadline_s=1e9))
            late = await kernel.generate(ask(max_tokens=60, deadline_s=0))
            assert (whole.finish_reason, late.finish_reason) == ("length", "deadline")
            assert whole.token_ids[: len(late.token_ids)] == late.token_ids != whole.token_ids
            stream = kernel.stream(ask(max_tokens=3000, deadline_s=0.05))
            tokens = [token async for chunk in stream for token in chunk.token_ids]
            assert stream.completion is not None and stream.completion.token_ids == tuple(tokens)
            assert kernel.ps() == [] and kernel.memory().kv == 0

    host(main)


def test_who_waits_longer_than_queue_s_is_refused_and_told_when_to_come_again(host: Any, gate: Gate) -> None:
    async def main() -> None:
        async with llm_os.Kernel(config(batch_size=1)) as kernel:
            gate.open = False
            first = kernel.stream(ask())
            await anyio.to_thread.run_sync(gate.wait)
            with pytest.raises(llm_os.Refused, match=r"has not run; queue_s allows 0.01 s; try again later") as caught:
                await kernel.generate(ask(queue_s=0.01))
            assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 0
            gate.release()
            assert (await first.collect()).finish_reason == "length"

    host(main)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(host: Any, gate: Gate) -> None:
    async def main() -> None:
        async with llm_os.Kernel(config(queue_limit=2)) as kernel:
            gate.open = False
            streams = [kernel.stream(ask()) for _ in range(2)]
            with pytest.raises(
                llm_os.Refused, match="2 processes are live, the most that queue_limit allows"
            ) as caught:
                await kernel.generate(ask())
            assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 0
            gate.release()
            for stream in streams:
                await stream.collect()
            assert len((await kernel.generate(ask())).token_ids) == 20

    host(main)


@pytest.mark.parametrize(
    ("quota", "message"),
    [
        ({"max_processes": 1}, "tenant 'eve' has 1 live processes, the most that its quota allows"),
        ({"max_tokens": 250}, r"tenant 'eve' has 50 of its 250 tokens left; the request needs 200"),
        ({"max_pages": 60}, r"tenant 'eve' has 10 of its 60 KV pages left; the request needs 50 of 4 tokens each"),
    ],
)
def test_a_tenant_beyond_its_quota_is_refused_and_others_are_not(
    host: Any, gate: Gate, quota: dict[str, int], message: str
) -> None:
    async def main() -> None:
        async with llm_os.Kernel(config(tenants={"eve": llm_os.Tenant(**quota)})) as kernel:
            gate.open = False
            first = kernel.stream(ask(tenant="eve"))
            await anyio.to_thread.run_sync(gate.wait)
            with pytest.raises(llm_os.Refused, match=message):
                await kernel.generate(ask(tenant="eve"))
            other = kernel.stream(ask(tenant="adam"))
            gate.release()
            assert len((await first.collect()).token_ids) == len((await other.collect()).token_ids) == 20
            if "max_tokens" not in quota:  # those are for life
                assert len((await kernel.generate(ask(tenant="eve"))).token_ids) == 20

    host(main)


def test_a_reader_that_is_slow_gets_fewer_and_larger_pieces_and_all_of_them(host: Any) -> None:
    async def main() -> None:
        async with llm_os.Kernel(config()) as kernel:
            slow = kernel.stream(ask(max_tokens=600))
            kernel.nice(slow.pid, 0)  # answered when the kernel knows of it
            while kernel.ps():
                await anyio.lowlevel.checkpoint()
            chunks = [chunk async for chunk in slow]
            assert len(chunks) < 300
            assert slow.completion is not None and len(slow.completion.token_ids) == 600
            assert tuple(token for chunk in chunks for token in chunk.token_ids) == slow.completion.token_ids
            assert "".join(chunk.text for chunk in chunks) == slow.completion.text
            assert [chunk.finish_reason for chunk in chunks[-2:]] == [None, "length"]

    host(main)


def test_samples_of_a_short_answer_all_come_though_the_first_has_ended_by_then() -> None:
    with llm_os.Kernel(config()) as kernel:
        in_a_thread(kernel.load, A)
        for _ in range(20):  # without care, some of the last ones ask for a parent that has gone in most rounds
            streams = kernel.samples(ask([1, 2, 3], max_tokens=1), 200)
            assert all(stream.result().usage.completion_tokens == 1 for stream in streams)


@pytest.mark.parametrize("expected_s", ["5", float("nan"), -1, []])
def test_a_wait_that_makes_no_sense_is_refused_and_harms_nobody(expected_s: Any) -> None:
    with llm_os.Kernel(config()) as kernel:
        stream = kernel.stream(ask())
        with pytest.raises(llm_os.RequestError, match="expected_s"):
            in_a_thread(kernel.block, stream.pid, expected_s)
        with pytest.raises(llm_os.RequestError, match="tokens"):
            in_a_thread(kernel.unblock, stream.pid, 5)
        assert stream.result().token_ids == alone(ask())


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1], "tenant": "\ud800"},
        {"prompt": [1], "sampling": llm_os.Sampling(stop=("\ud800",))},
        {"messages": [{"role": "user", "content": "hi", "name": object()}]},
        {"messages": [{"role": "user", "content": "hi", "number": 2**70}]},
    ],
)
def test_a_request_that_cannot_be_journaled_is_refused_and_its_neighbours_go_on(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    request = ask(max_tokens=300)
    with llm_os.Kernel(config(state=tmp_path)) as kernel:
        neighbour = kernel.stream(request)
        next(neighbour)
        with pytest.raises(llm_os.RequestError, match="cannot be journaled"):
            kernel.stream(llm_os.Request(model=A, **fields)).result()
        neighbour.result()
        assert neighbour.completion is not None
        assert neighbour.completion.token_ids == alone(request)
