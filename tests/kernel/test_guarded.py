"""What plugins give is checked when it comes, and what comes too late is closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

import llm_os
from llm_os.kernel.guarded import lacks, opened
from llm_os.kernel.isolation import MAX_FAILURES, Health, within


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set at the end of the test, so that calls which hang until then end with it."""
    event = threading.Event()
    yield event
    event.set()


class Log:
    sessions: dict[int, object] = {}
    last_pid = 0
    warning = ""

    def append(self, records: object) -> None: ...

    def close(self) -> None: ...


def test_something_of_a_protocol_is_known_by_its_members() -> None:
    assert lacks(Log(), llm_os.Log) is None
    assert lacks(llm_os.Fair(), llm_os.Policy) is None
    assert lacks(object(), llm_os.Log) == "object, no Log: it has no append"
    assert lacks(llm_os.Fair(), llm_os.Filter) == "Fair, no Filter: it has no open"


def test_an_error_of_ours_passes_and_no_other_does() -> None:
    def refuse() -> None:
        raise llm_os.FormatError("the file is cut off")

    health = Health("mine")
    for _ in range(2 * MAX_FAILURES):
        with pytest.raises(llm_os.FormatError, match="cut off"):
            opened(health, "open_log", llm_os.Log, refuse, 60.0)
    assert health.off is None
    with pytest.raises(llm_os.PluginError, match="plugin 'mine': open_log raised ZeroDivisionError"):
        opened(health, "open_log", llm_os.Log, lambda: 1 / 0, 60.0)
    with pytest.raises(llm_os.PluginError, match="plugin 'mine': open_log gave int, no Log"):
        opened(health, "open_log", llm_os.Log, lambda: 7, None)
    assert opened(health, "open_log", llm_os.Log, lambda: None, None) is None


def test_what_comes_too_late_is_given_to_who_puts_it_away(released: threading.Event) -> None:
    put_away: list[str] = []
    done = threading.Event()

    def slow() -> str:
        released.wait()
        return "late"

    def late(result: str) -> None:
        put_away.append(result)
        done.set()

    with pytest.raises(TimeoutError, match=r"it took longer than 0\.05 s"):
        within(0.05, slow, late)
    assert put_away == []
    released.set()
    assert done.wait(60)
    assert put_away == ["late"]


def test_a_timeout_that_the_call_raises_is_its_own() -> None:
    def bus() -> None:
        raise TimeoutError("the bus does not answer")

    with pytest.raises(TimeoutError, match="the bus does not answer"):
        within(60.0, bus)


def test_a_failure_of_one_hook_is_not_made_good_by_another() -> None:
    health = Health("mine")
    for _ in range(MAX_FAILURES):
        assert health.off is None
        health.failed("TextFilter.push", "raised KeyError")
        health.well("Filter.open")
    assert health.off is not None and "TextFilter.push raised KeyError" in health.off
