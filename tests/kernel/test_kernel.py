"""The kernel in its surroundings: real threads, real event loops, the sim driver."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import anyio
import pytest

import llm_os
from llm_os.drivers.sim import SimDriver
from llm_os.kernel.loop import Loop

CONFIG = llm_os.Config(driver="sim", memory="128MiB", frame_size="64KiB")


def ask(prompt: str = "hello", **sampling: Any) -> llm_os.Request:
    return llm_os.Request(
        model="sim:a", prompt=prompt, sampling=llm_os.Sampling(**{"max_tokens": 20, "temperature": 0, **sampling})
    )


def endless(**sampling: Any) -> llm_os.Request:
    return ask(max_tokens=4000, **sampling)


def wait_idle(kernel: llm_os.Kernel) -> None:
    """Until the kernel has seen all that was posted before: a later event is answered after the earlier ones."""
    kernel.stream(ask()).result()
    assert kernel.ps() == []
    assert kernel.memory().kv == 0


@pytest.fixture(autouse=True)
def threads_come_back() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("llm-os"):
            thread.join(10)
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("llm-os")]
    assert not left


@pytest.fixture
def kernel() -> Iterator[llm_os.Kernel]:
    with llm_os.Kernel(CONFIG) as kernel:
        yield kernel


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


pytestmark = pytest.mark.anyio


def test_a_plain_for_loop_reads_a_stream(kernel: llm_os.Kernel) -> None:
    stream = kernel.stream(ask())
    text = "".join(chunk.text for chunk in stream)
    assert stream.completion is not None and stream.completion.text == text and len(text) == 20
    assert list(stream) == []


async def test_many_tasks_of_one_loop_share_a_kernel(anyio_backend: str, kernel: llm_os.Kernel) -> None:
    answers: dict[int, str] = {}

    async def one(index: int) -> None:
        answers[index] = (await kernel.generate(ask(f"question {index % 4}"))).text

    async with anyio.create_task_group() as tasks:
        for index in range(16):
            tasks.start_soon(one, index)
    assert len({answers[index] for index in range(4)}) == 4
    assert all(answers[index] == answers[index % 4] for index in range(16))


def test_threads_and_loops_of_all_kinds_share_a_kernel(kernel: llm_os.Kernel) -> None:
    expected = kernel.stream(ask()).result().text
    answers: list[str] = []

    async def in_loop() -> None:
        answers.append((await kernel.generate(ask())).text)

    threads = [
        threading.Thread(target=lambda: answers.append(kernel.stream(ask()).result().text)),
        threading.Thread(target=lambda: anyio.run(in_loop, backend="asyncio")),
        threading.Thread(target=lambda: anyio.run(in_loop, backend="trio")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 3


async def test_leaving_a_loop_early_ends_the_process(anyio_backend: str, kernel: llm_os.Kernel) -> None:
    async for chunk in kernel.stream(endless()):
        assert chunk.finish_reason is None
        break
    wait_idle(kernel)


async def test_an_exception_in_the_consumer_ends_the_process(anyio_backend: str, kernel: llm_os.Kernel) -> None:
    with pytest.raises(ZeroDivisionError):
        async for _ in kernel.stream(endless()):
            raise ZeroDivisionError
    wait_idle(kernel)


async def test_a_cancelled_wait_ends_the_process(anyio_backend: str, kernel: llm_os.Kernel) -> None:
    started = anyio.Event()

    async def consume() -> None:
        async for _ in kernel.stream(endless()):
            started.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consume)
        await started.wait()
        tasks.cancel_scope.cancel()
    wait_idle(kernel)


def test_a_loop_closed_under_a_stream_leaves_the_kernel_serving(kernel: llm_os.Kernel) -> None:
    async def consume() -> None:
        async for _ in kernel.stream(endless()):
            loop.stop()

    loop = asyncio.new_event_loop()
    task = loop.create_task(consume())
    loop.run_forever()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()
    del task
    wait_idle(kernel)


def test_a_loop_closed_inside_async_with_closes_the_kernel() -> None:
    entered: list[llm_os.Kernel] = []

    async def host() -> None:
        async with llm_os.Kernel(CONFIG) as kernel:
            entered.append(kernel)
            loop.stop()
            await asyncio.Event().wait()

    loop = asyncio.new_event_loop()
    coroutine = host()
    task = loop.create_task(coroutine)
    loop.run_forever()
    loop.close()
    coroutine.close()
    assert not entered[0]._thread.is_alive()
    task._log_destroy_pending = False  # type: ignore[attr-defined]


async def test_kill_ends_a_stream_with_what_it_has(anyio_backend: str, kernel: llm_os.Kernel) -> None:
    stream = kernel.stream(endless())
    last = None
    async for chunk in stream:
        last = chunk
        if chunk.finish_reason is None:
            await kernel.kill(stream.pid)
    assert last is not None and last.finish_reason == "cancelled"
    assert stream.completion is not None and len(stream.completion.token_ids) >= 1


async def test_models_load_and_unload_on_request(anyio_backend: str, kernel: llm_os.Kernel) -> None:
    before = kernel.memory()
    await kernel.load("sim:a")
    assert [(model.name, model.where) for model in kernel.models()] == [("sim:a", "on device")]
    assert kernel.memory().weights == 4 << 20
    await kernel.unload("sim:a")
    assert [(model.name, model.where) for model in kernel.models()] == [("sim:a", "on disk")]
    assert kernel.memory() == before
    with pytest.raises(llm_os.ModelNotFound):
        await kernel.unload("sim:a")


def test_an_error_reaches_the_one_who_asked(kernel: llm_os.Kernel) -> None:
    with pytest.raises(llm_os.RequestError, match="empty"):
        kernel.stream(ask("")).result()
    with pytest.raises(llm_os.ModelNotFound):
        kernel.stream(llm_os.Request(model="no-such-model", prompt="x")).result()
    with pytest.raises(llm_os.RequestError, match="no process 99"):
        kernel.nice(99, 0)
    with pytest.raises(llm_os.RequestError, match="nice is 20"):
        kernel.nice(1, 20)
    assert len(kernel.stream(ask()).result().token_ids) == 20


def test_a_call_with_a_wrong_type_is_refused_at_the_door(kernel: llm_os.Kernel) -> None:
    bad: Any = ["a"]
    for call in (kernel.load, kernel.unload, kernel.kill):
        with pytest.raises(llm_os.RequestError, match="must be"):
            anyio.run(call, bad)
    for refused in (lambda: kernel.stream(bad), lambda: kernel.fork(bad), lambda: kernel.nice(bad, 0)):
        with pytest.raises(llm_os.RequestError, match="must be"):
            refused()
    odd = llm_os.Request(model="sim:a", prompt="x", tenant="\ud800", sampling=llm_os.Sampling(max_tokens=2))
    assert len(kernel.stream(odd).result().token_ids) == 2


def test_the_device_is_told_what_to_do_before_readers_are_told_what_came(
    kernel: llm_os.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[list[str]] = []

    def noted(name: str) -> Any:
        method = getattr(Loop, name)

        def call(self: Loop, given: Any) -> Any:
            if name == "perform":
                turns.append([])
            turns[-1].append(name)
            return method(self, given)

        return call

    for name in ("perform", "operate", "deliver"):
        monkeypatch.setattr(Loop, name, noted(name))
    assert len(kernel.stream(ask(max_tokens=9)).result().token_ids) == 9
    both = [turn[1:] for turn in turns if {"operate", "deliver"} <= set(turn)]
    assert len(both) >= 8
    assert all(turn == sorted(turn, reverse=True) for turn in both)


def test_a_fork_continues_from_its_parent(kernel: llm_os.Kernel) -> None:
    parent = kernel.stream(endless(temperature=1.0))
    next(parent)
    child = kernel.fork(parent.pid)
    next(child)
    child.close()
    parent.close()
    wait_idle(kernel)


def test_close_tells_everyone_who_waits(kernel: llm_os.Kernel) -> None:
    stream = kernel.stream(endless())
    next(stream)
    kernel.close()
    kernel.close()
    with pytest.raises(llm_os.Closed):
        for _ in stream:
            pass
    with pytest.raises(llm_os.Closed):
        kernel.stream(ask()).result()
    with pytest.raises(llm_os.Closed):
        anyio.run(kernel.load, "sim:a")


def test_a_forgotten_kernel_stops_by_itself() -> None:
    kernel = llm_os.Kernel(CONFIG)
    kernel.stream(ask()).result()
    thread = kernel._thread
    del kernel
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_script_that_never_closes_its_kernel_exits_in_silence() -> None:
    code = (
        "import llm_os; k = llm_os.Kernel(llm_os.Config(driver='sim', memory='128MiB'));"
        "s = k.stream(llm_os.Request(model='sim:a', prompt='x', sampling=llm_os.Sampling(max_tokens=3)));"
        "print(len(s.result().token_ids))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_calls_on_a_closed_kernel_do_not_keep_their_frames(kernel: llm_os.Kernel) -> None:
    class Witness:
        pass

    def call() -> weakref.ref[Witness]:
        witness = Witness()
        with pytest.raises(llm_os.Closed):
            kernel.stream(ask()).result()
        return weakref.ref(witness)

    kernel.close()
    witnesses = [call() for _ in range(5)]
    gc.collect()
    assert [witness() for witness in witnesses] == [None] * 5


def test_two_kernels_in_one_process_do_not_meet() -> None:
    with llm_os.Kernel(CONFIG) as one, llm_os.Kernel(CONFIG) as two:
        assert one.stream(ask()).result().text == two.stream(ask()).result().text
        assert len(one.models()) == 1
        one.close()
        assert two.stream(ask()).result().finish_reason == "length"


def test_a_driver_that_raises_or_cancels_ends_the_request_only(
    kernel: llm_os.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(self: SimDriver, batch: object) -> Future[Any]:
        raise OSError("device on fire")

    def cancels(self: SimDriver, batch: object) -> Future[Any]:
        future: Future[Any] = Future()
        future.cancel()
        future.set_running_or_notify_cancel()
        return future

    def answers_nothing(self: SimDriver, batch: object) -> None:
        return None

    faults = ((raises, "device on fire"), (cancels, "cancelled"), (answers_nothing, "Run with no future"))
    for run, message in faults:
        with monkeypatch.context() as patch:
            patch.setattr(SimDriver, "run", run)
            with pytest.raises(llm_os.DriverError, match=message):
                kernel.stream(ask()).result()
        wait_idle(kernel)


def test_a_bug_in_the_core_closes_the_kernel_and_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_os.kernel.core import Core

    seen: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))

    def broken(self: Core) -> None:
        if self.processes:
            raise RuntimeError("planted")

    with llm_os.Kernel(CONFIG) as kernel:
        monkeypatch.setattr(Core, "schedule", broken)
        with pytest.raises(llm_os.Closed, match="planted"):
            kernel.stream(ask()).result()
        with pytest.raises(llm_os.Closed):
            kernel.stream(ask()).result()
    assert len(seen) == 1


async def test_a_driver_that_fails_to_close_keeps_nobody_waiting(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))

    def close(self: SimDriver) -> None:
        raise OSError("stuck")

    monkeypatch.setattr(SimDriver, "close", close)
    with anyio.fail_after(30):
        async with llm_os.Kernel(CONFIG) as kernel:
            await kernel.generate(ask())
    assert [str(error) for error in seen] == ["stuck"]


def test_unknown_drivers_and_plugins_are_named() -> None:
    with pytest.raises(llm_os.ConfigError, match="driver is 'gpu'; registered are: auto, cpu, cuda, sim"):
        llm_os.Kernel(llm_os.Config(driver="gpu"))
    with pytest.raises(llm_os.ConfigError, match="plugin 'nonsense' is not installed"):
        llm_os.Kernel(llm_os.Config(driver="sim", plugins=("nonsense",)))


def test_a_budget_beyond_the_device_is_refused() -> None:
    with pytest.raises(llm_os.ConfigError, match="memory is 2GiB; simulated has 1 GiB"):
        llm_os.Kernel(llm_os.Config(driver="sim", memory="2GiB"))


async def test_leaving_async_with_leaves_no_thread_at_all(anyio_backend: str) -> None:
    before = set(threading.enumerate())
    async with llm_os.Kernel(CONFIG) as kernel:
        await kernel.generate(ask())
    assert set(threading.enumerate()) == before


def test_the_one_liner_answers_and_cleans_up() -> None:
    text = llm_os.generate("sim:a", "Hi", config=CONFIG, max_tokens=12, temperature=0)
    assert len(text) == 12


def test_closing_ends_also_when_the_swap_store_cannot_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_os.drivers.persistence.swap import SlotStore

    def broken(self: SlotStore) -> None:
        raise OSError("a disk that has gone")

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(SlotStore, "close", broken)

    async def main() -> None:
        async with llm_os.Kernel(llm_os.Config(driver="sim", memory="64MiB", swap_host="1MiB")) as kernel:
            await kernel.generate(ask())

    anyio.run(main)
