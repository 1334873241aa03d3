"""The judge of pins: what was promised to stay must not go, and what was not promised may."""

from __future__ import annotations

import pytest

from llm_os.drivers.simulation.pins import Pins
from llm_os.drivers.simulation.violation import Violation
from llm_os.kernel import events as ev
from llm_os.kernel.driver import Move
from llm_os.kernel.errors import DriverError, Refused

UNLOAD = ev.Unload(9, "a")


@pytest.fixture
def pins() -> Pins:
    pins = Pins()
    pins.asked(ev.Pin(1, "a", True))
    pins.replied(ev.Reply(1))
    return pins


def test_a_pinned_model_must_not_go(pins):
    with pytest.raises(Violation, match="pin: a is unloaded"):
        pins.unload(UNLOAD)
    pins.unload(ev.Unload(9, "b"))


def test_a_model_loaded_with_a_pin_must_not_go():
    pins = Pins()
    pins.asked(ev.LoadModel(1, "a", pin=True))
    pins.unload(UNLOAD)
    pins.replied(ev.Reply(1))
    with pytest.raises(Violation):
        pins.unload(UNLOAD)


@pytest.mark.parametrize("event", [ev.Pin(2, "a", False), ev.UnloadModel(2, "a")])
def test_who_takes_a_pin_back_lets_it_go_at_once(pins, event):
    pins.asked(event)
    pins.unload(UNLOAD)


def test_a_pin_of_a_model_that_is_to_be_unloaded_promises_nothing(pins):
    pins.asked(ev.UnloadModel(2, "a"))
    pins.asked(ev.Pin(3, "a", True))
    pins.replied(ev.Reply(3))
    pins.unload(UNLOAD)


def test_a_pin_that_was_refused_promises_nothing():
    pins = Pins()
    pins.asked(ev.Pin(1, "a", True))
    pins.replied(ev.Reply(1, DriverError("no")))
    pins.unload(UNLOAD)


def test_a_pin_goes_with_a_model_that_cannot_be_had(pins):
    pins.failed(ev.Open(2, "a"), ())
    pins.unload(UNLOAD)


def test_a_pin_stays_when_a_copy_fails_on_the_device(pins):
    pins.failed(ev.Copy(2, "a", (Move(1, 2),)), {"a"})
    with pytest.raises(Violation):
        pins.unload(UNLOAD)
    pins.failed(ev.Copy(2, "b", (Move(1, 2),)), {"b"})  # which may have been in the way of a, that waits to be loaded
    pins.unload(UNLOAD)


def test_a_pin_goes_with_a_load_that_is_refused_for_room(pins):
    pins.refused("a", Refused("a needs 3 MiB; unpin a model or raise memory"))
    pins.unload(UNLOAD)
