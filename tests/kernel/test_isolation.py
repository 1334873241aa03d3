"""Plugins that raise, hang or answer nonsense fail a call, not the kernel; what they promise is what they get."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from types import NoneType
from typing import Any

import pytest

import llm_os
from llm_os.kernel.isolation import MAX_FAILURES, Guard, Health, Lane


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set at the end of the test, so that calls which hang until then end with it."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane(Health("mine"), 0.1)
    yield lane
    lane.shut()
    lane.wait(time.monotonic() + 1.0)


# -- calls in a plugin's own thread ------------------------------------------------------------------------------------


def test_a_call_that_comes_after_the_kernel_has_closed_is_told_so_at_once(lane: Lane) -> None:
    assert lane.call("admit", str, lambda: "no") == "no"
    lane.shut()
    with pytest.raises(llm_os.Closed, match="the kernel is closed"):
        lane.call("TextFilter.push", str, lambda: "never")
    lane.post("halting", lambda: None)


def test_a_call_returns_what_the_plugin_says(lane: Lane) -> None:
    assert lane.call("admit", str, lambda: "no") == "no"
    assert lane.call("admit", (str, NoneType), lambda: None) is None
    with pytest.raises(llm_os.PluginError, match="gave NoneType, no str"):
        lane.call("TextFilter.push", str, lambda: None)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: 1 / 0, "plugin 'mine': admit raised ZeroDivisionError: division by zero"),
        (lambda: 7, "plugin 'mine': admit gave int, no str"),
        (lambda: (_ for _ in ()).throw(SystemExit(3)), "plugin 'mine': admit raised RuntimeError: SystemExit"),
        (lambda: (_ for _ in ()).throw(TimeoutError("bus")), "plugin 'mine': admit raised TimeoutError: bus"),
    ],
)
def test_a_call_that_fails_is_told_with_the_plugins_name(lane: Lane, function: Any, message: str) -> None:
    with pytest.raises(llm_os.PluginError, match=message):
        lane.call("admit", str, function)
    assert lane.call("admit", str, lambda: "well") == "well"


def test_an_error_of_ours_is_the_plugins_word_and_no_failure(lane: Lane) -> None:
    def refuse() -> None:
        raise llm_os.RequestError("too long")

    for _ in range(2 * MAX_FAILURES):
        with pytest.raises(llm_os.RequestError, match="too long"):
            lane.call("Filter.open", tuple, refuse)


def test_a_call_that_hangs_is_given_up_and_the_next_one_runs(lane: Lane, released: threading.Event) -> None:
    with pytest.raises(llm_os.PluginError, match=r"admit took longer than 0\.1 s"):
        lane.call("admit", str, released.wait)
    assert lane.call("admit", str, lambda: "next") == "next"


def test_a_call_behind_one_that_hangs_has_its_whole_time(lane: Lane, released: threading.Event) -> None:
    lane.post("booted", released.wait)
    assert lane.call("admit", str, lambda: "after it") == "after it"


def test_three_failures_in_a_row_turn_a_plugin_off_and_fewer_do_not(lane: Lane) -> None:
    for _ in range(MAX_FAILURES - 1):
        with pytest.raises(llm_os.PluginError):
            lane.call("admit", str, lambda: 7)
    lane.call("admit", str, lambda: "well")
    for _ in range(MAX_FAILURES):
        with pytest.raises(llm_os.PluginError, match="gave int"):
            lane.call("admit", str, lambda: 7)
    with pytest.raises(llm_os.PluginError, match="plugin 'mine' is off: it failed 3 times in a row, last: admit gave"):
        lane.call("admit", str, lambda: "well again")


def test_events_come_in_order_and_too_many_are_dropped(lane: Lane, released: threading.Event) -> None:
    seen: list[int] = []
    held = threading.Event()
    slow = Lane(Health("slow"), 60.0)
    slow.post("step_finished", lambda: (held.set(), released.wait(), None)[2])
    held.wait()
    for number in range(2000):
        slow.post("step_finished", seen.append, number, droppable=True)
    released.set()
    slow.call("admit", int, lambda: 1)
    slow.shut()
    slow.wait(time.monotonic() + 60.0)
    assert seen == list(range(1024)) and slow._missed == 2000 - 1024


def test_an_event_that_hangs_does_not_keep_the_others(released: threading.Event) -> None:
    lane = Lane(Health("mine"), 0.05)
    came = threading.Event()
    lane.post("booted", released.wait)
    lane.post("step_finished", lambda: came.set())
    for _ in iter(lambda: came.wait(0.01), True):
        for _ in range(1100):
            lane.post("step_finished", lambda: None, droppable=True)
    lane.shut()
    lane.wait(time.monotonic() + 1.0)


# -- calls in the kernel's thread --------------------------------------------------------------------------------------


@pytest.fixture
def guard() -> Iterator[Guard]:
    guard = Guard(0.05)
    yield guard
    guard.close()


def test_a_loop_without_end_is_interrupted_in_the_callers_thread(guard: Guard) -> None:
    def forever() -> int:
        while True:
            try:  # noqa: SIM105
                sum(range(1000))
            except:  # noqa: E722
                pass
            sum(range(1000))

    health = Health("mine")
    for _ in range(MAX_FAILURES):
        assert guard.call(health, "Policy.share", forever) is None
    assert "Policy.share took longer" in (health.off or "")
    assert guard.call(health, "Policy.share", lambda: 1) is None


def test_a_call_that_ends_just_when_it_would_be_interrupted_disturbs_nobody(guard: Guard) -> None:
    health = Health("mine")
    results = []
    for round in range(60):
        until = time.monotonic() + 0.045 + 0.0005 * round

        def spin(until: float = until) -> int:
            while time.monotonic() < until:
                pass
            return 1

        results.append(guard.call(health, "Policy.rank", spin))
        health.well("Policy.rank")
    assert set(results) <= {1, None} and 1 in results


class Rude(Exception):
    def __str__(self) -> str:
        raise SystemExit


def rude() -> None:
    raise Rude


@pytest.mark.parametrize("function", [lambda: 1 / 0, lambda: sys.exit(3), rude])
def test_a_guarded_call_that_fails_gives_none(guard: Guard, function: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "llm_os.plugins"):
        assert guard.call(Health("mine"), "Policy.rank", function) is None
    assert "plugin 'mine': Policy.rank" in caplog.text


# -- a kernel with plugins ---------------------------------------------------------------------------------------------


def ask(kernel: llm_os.Kernel, prompt: str, **fields: Any) -> llm_os.Completion:
    sampling = llm_os.Sampling(max_tokens=8, temperature=0)
    return kernel.stream(llm_os.Request(model="sim:a", prompt=prompt, sampling=sampling, **fields)).result()


WATCH = """
import llm_os
seen = []

@llm_os.hookimpl
def booted(config, device): seen.append(("booted", device.driver))

@llm_os.hookimpl
def step_finished(step): seen.append(("step", step.model, step.sequences, step.tokens))

@llm_os.hookimpl
def process_exited(process): seen.append(("exit", process.pid, process.tenant, process.finish_reason, process.error))

@llm_os.hookimpl
def admit(request): return "not  on\\nSundays" if request.tenant == "t" else None

@llm_os.hookimpl
def halting(): seen.append(("halting",))
"""


def test_events_tell_what_happened_in_order(install: Any) -> None:
    install("watch_plugin", WATCH, "booted", "step_finished", "process_exited", "admit", "halting")
    with llm_os.Kernel(llm_os.Config(driver="sim", plugins=("watch_plugin",))) as kernel:
        done = ask(kernel, "hello", tenant="u")
        with pytest.raises(llm_os.Refused, match=r"^not on Sundays$"):
            ask(kernel, "hello", tenant="t")
    seen = importlib.import_module("watch_plugin").seen
    assert seen[0] == ("booted", "sim") and seen[-1] == ("halting",)
    steps = [entry for entry in seen if entry[0] == "step"]
    assert steps == [("step", "sim:a", 1, 5), *[("step", "sim:a", 1, 1)] * 7]
    ends = [entry[2:] for entry in seen if entry[0] == "exit"]
    assert ends == [("u", done.finish_reason, None), ("t", None, "not on Sundays")]


FILTER = """
import threading
import llm_os
from msgspec import structs

class Upper:
    def __init__(self): self.held = ""
    def push(self, text):
        self.held, text = (self.held + text)[-3:], (self.held + text)[:-3]
        return text.upper()
    def flush(self): return self.held.upper() + "!"

class Words:
    def open(self, request):
        match request.tenant:
            case "": return structs.replace(request, prompt=request.prompt[::-1]), Upper()
            case "raise": raise KeyError("x")
            case "type": return request
            case "hang": threading.Event().wait()
            case "push": return request, self
        return None
    def push(self, text): return 7
    def flush(self): return ""

@llm_os.hookimpl
def register_filters(register): register("words", Words())
"""


def test_a_filter_changes_what_the_model_sees_and_what_the_reader_gets(install: Any) -> None:
    install("filter_plugin", FILTER, "register_filters")
    with llm_os.Kernel(llm_os.Config(driver="sim")) as plain:
        expected = ask(plain, "olleh")
        aside = ask(plain, "hello", tenant="other")
    with llm_os.Kernel(llm_os.Config(driver="sim", plugins=("filter_plugin",))) as kernel:
        done = ask(kernel, "hello")
        assert done.text == expected.text.upper() + "!" and done.token_ids == expected.token_ids
        request = llm_os.Request(model="sim:a", prompt="hello", sampling=llm_os.Sampling(max_tokens=8, temperature=0))
        streams = kernel.samples(request, 3)
        for stream in streams:
            chunks = [chunk.text for chunk in stream]
            assert stream.completion is not None and "".join(chunks) == stream.completion.text == done.text
        assert ask(kernel, "hello", tenant="other").text == aside.text


@pytest.mark.parametrize(
    ("tenant", "message"),
    [
        ("raise", "Filter.open raised KeyError"),
        ("type", "Filter.open gave Request, no tuple"),
        ("hang", "Filter.open took longer than 0.2 s"),
        ("push", "TextFilter.push gave int, no str"),
    ],
)
def test_a_filter_that_fails_fails_its_request_and_no_other(install: Any, tenant: str, message: str) -> None:
    name = f"filter_plugin_{tenant}"
    install(name, FILTER, "register_filters")
    config = llm_os.Config(driver="sim", plugins=(name,), hook_limit_s=0.2)
    sampling = llm_os.Sampling(max_tokens=8, temperature=0)
    request = llm_os.Request(model="sim:a", prompt="hello", tenant="other", sampling=sampling)
    with llm_os.Kernel(config) as kernel:
        beside = ask(kernel, "hello", tenant="other")
        for _ in range(MAX_FAILURES):
            other = kernel.stream(request)
            with pytest.raises(llm_os.PluginError, match=f"plugin '{name}': {message}"):
                ask(kernel, "hello", tenant=tenant)
            assert other.result().text == beside.text
        if tenant != "push":  # who opens well in between is not off
            for _ in range(MAX_FAILURES):
                with pytest.raises(llm_os.PluginError):
                    ask(kernel, "hello", tenant=tenant)
            with pytest.raises(llm_os.PluginError, match="is off"):  # fails closed: nobody passes it by
                ask(kernel, "hello", tenant="other")
        assert kernel.ps() == []


POLICY = """
import llm_os

class Policy:
    def share(self, share): return BODY
    def rank(self, candidate): return -candidate.pid

@llm_os.hookimpl
def register_policies(register): register("mine", lambda config: Policy())
"""


@pytest.mark.parametrize("body", ["0.0", "1 / 0", "'x'", "float('nan')", "[() for _ in iter(int, 1)]"])
def test_a_policy_that_fails_is_replaced_by_fair_and_changes_no_answer(install: Any, body: str) -> None:
    name = f"policy_plugin_{abs(hash(body)) % 10**6}"
    install(name, POLICY.replace("BODY", body), "register_policies")
    config = llm_os.Config(driver="sim", plugins=(name,), policy="mine", hook_limit_s=0.1, batch_size=1)
    with llm_os.Kernel(llm_os.Config(driver="sim")) as plain:
        expected = [ask(plain, prompt, tenant=prompt).text for prompt in "abcd"]
    with llm_os.Kernel(config) as kernel:
        requests = [
            llm_os.Request(model="sim:a", prompt=p, tenant=p, sampling=llm_os.Sampling(max_tokens=8, temperature=0))
            for p in "abcd"
        ]
        assert [s.result().text for s in [kernel.stream(request) for request in requests]] == expected


def test_an_interrupt_stays_inside_the_call_that_took_too_long() -> None:
    """Freeing what such a call has piled up takes a while too, in which it is interrupted again."""
    guard, health = Guard(0.1), Health("x")
    for _ in range(10):
        assert guard.call(health, "share", lambda: [() for _ in iter(int, 1)]) is None
        health.off = None
    assert guard.call(health, "share", lambda: 1) == 1
    guard.close()


VICTIM = """
import llm_os
asked = []

@llm_os.hookimpl
def pick_victim(victims):
    asked.append([info.name for info in victims])
    return CHOICE
"""


@pytest.mark.parametrize(("choice", "gone"), [("victims[-1].name", -1), ("None", 0), ("'sim:z'", 0), ("1 / 0", 0)])
def test_a_plugin_picks_which_model_leaves(install: Any, choice: str, gone: int) -> None:
    name = f"victim_plugin_{abs(hash(choice)) % 10**6}"
    install(name, VICTIM.replace("CHOICE", choice), "pick_victim")
    config = llm_os.Config(driver="sim", plugins=(name,), memory="11MiB", frame_size="64KiB")
    sampling = llm_os.Sampling(max_tokens=2, temperature=0)
    models = [f"sim:{letter}?layers=4&layer_bytes=1048576" for letter in "abc"]
    with llm_os.Kernel(config) as kernel:
        for model in models:
            kernel.stream(llm_os.Request(model=model, prompt="x", sampling=sampling)).result()
        there = {info.name for info in kernel.models() if info.where == "on device"}
    (victims,) = importlib.import_module(name).asked
    assert sorted(victims) == models[:2]
    assert there == set(models) - {victims[gone]}
