"""A process on its way through filters: nothing passes them by, nothing that is finished is lost."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

import llm_os

MARK = """
import threading
import llm_os
from msgspec import structs

class Mark:
    "Numbers the characters of the answer: what it shows depends on all that it has seen."
    def __init__(self, filters): self.filters, self.seen = filters, 0
    def push(self, text):
        self.filters.gate.wait()
        start, self.seen = self.seen, self.seen + len(text)
        return "".join(f"{c}{(start + i) % 10}" for i, c in enumerate(text))
    def flush(self): return "."

class Filters:
    gate = threading.Event()
    gate.set()
    opened = []
    broken = False
    def open(self, request):
        self.opened.append(request)
        if self.broken: raise OSError("no words")
        if request.messages: request.messages.append({"role": "user", "content": "added in place"})
        return request, Mark(self)

filters = Filters()

@llm_os.hookimpl
def register_filters(register): register("mark", filters)

@llm_os.hookimpl
def admit(request):
    filters.asked = getattr(filters, "asked", 0) + 1
"""


def marked(text: str) -> str:
    return "".join(f"{c}{i % 10}" for i, c in enumerate(text)) + "."


@pytest.fixture
def plugin(install: Any, request: pytest.FixtureRequest) -> Any:
    import importlib

    name = f"mark_plugin_{abs(hash(request.node.name)) % 10**8}"
    install(name, MARK, "register_filters", "admit")
    return importlib.import_module(name)


def question(**fields: Any) -> llm_os.Request:
    sampling = llm_os.Sampling(max_tokens=fields.pop("max_tokens", 40), temperature=0)
    return llm_os.Request(**{"model": "sim:a?end_after=0", "prompt": "hello", "sampling": sampling, **fields})


def test_a_forks_filter_has_seen_what_its_parent_said_and_its_reader_is_not_told_it_again(plugin: Any) -> None:
    config = llm_os.Config(driver="sim", memory="64MiB", plugins=(plugin.__name__,))
    with llm_os.Kernel(config) as kernel:
        parent = kernel.stream(question(max_tokens=600))
        next(iter(parent))
        child = kernel.fork(parent.pid)
        told = "".join(chunk.text for chunk in child)
        assert child.completion is not None
        whole = child.completion.text
        letters, numbers = whole[:-1:2], whole[1:-1:2]
        assert len(letters) == 600 and numbers == "".join(str(i % 10) for i in range(600))
        assert whole.endswith(told) and len(told) < len(whole)
        assert parent.result().text[:-1:2] == letters


def test_siblings_are_admitted_once_and_get_the_request_as_it_was_asked(plugin: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with llm_os.Kernel(llm_os.Config(driver="sim", memory="64MiB", plugins=(plugin.__name__,))) as kernel:
        streams = kernel.samples(question(prompt=None, messages=messages), 3)
        texts = {stream.result().text for stream in streams}
    assert len(texts) == 1 and messages == [{"role": "user", "content": "hello"}]
    assert plugin.filters.asked == 1
    assert [len(request.messages) for request in plugin.filters.opened] == [2, 2, 2]


def test_an_answer_that_is_finished_is_not_lost_when_the_kernel_closes(plugin: Any) -> None:
    with llm_os.Kernel(llm_os.Config(driver="sim")) as plain:
        expected = plain.stream(question()).result().text
    kernel = llm_os.Kernel(llm_os.Config(driver="sim", plugins=(plugin.__name__,), hook_limit_s=60))
    plugin.filters.gate.clear()
    stream = kernel.stream(question())
    while not kernel._loop.leaving:  # until the core has ended it
        pass
    closing = threading.Thread(target=kernel.close)
    closing.start()
    plugin.filters.gate.set()
    closing.join()
    assert stream.result().text == marked(expected)


def test_who_waits_for_a_filter_is_told_at_once_that_its_time_is_up(plugin: Any) -> None:
    config = llm_os.Config(driver="sim", plugins=(plugin.__name__,), hook_limit_s=60, queue_limit=2)
    with llm_os.Kernel(config) as kernel:
        plugin.filters.gate.clear()
        held = kernel.stream(question())
        next_in_line = kernel.stream(question())
        with pytest.raises(llm_os.Refused):
            for _ in range(3):
                kernel.stream(question()).result()
        next_in_line.close()
        plugin.filters.gate.set()
        assert held.result().text.endswith(".")


def test_a_session_whose_filter_fails_after_a_crash_is_kept_for_the_next_life(plugin: Any, tmp_path: Path) -> None:
    config = llm_os.Config(driver="sim", state=tmp_path / "state", plugins=(plugin.__name__,))

    def crash() -> None:
        kernel = llm_os.Kernel(config)
        stream = kernel.stream(question(max_tokens=2000))
        next(iter(stream))
        os._exit(0)

    child = os.fork()
    if child == 0:
        try:
            crash()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    plugin.filters.broken = True
    with llm_os.Kernel(config) as kernel:
        (pid,) = kernel.recovered
        with pytest.raises(llm_os.PluginError, match="no words"):
            kernel.attach(pid).result()
    plugin.filters.broken = False
    with llm_os.Kernel(config) as kernel:
        assert kernel.recovered == (pid,)
        stream = kernel.attach(pid)
        first = next(iter(stream)).text
        assert first == marked(first[::2])[:-1]
        anyio.run(kernel.kill, pid)


def test_options_for_a_plugin_that_is_not_enabled_are_refused() -> None:
    with pytest.raises(llm_os.ConfigError, match="options are for plugin 'redakt', which is not enabled"):
        llm_os.Kernel(llm_os.Config(driver="sim", options={"redakt": {}}))
