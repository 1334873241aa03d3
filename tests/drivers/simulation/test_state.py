"""The machine's disk and host memory: what goes to swap comes back as it was, or is known to be lost."""

from __future__ import annotations

from typing import Any

import pytest

from llm_os.drivers.sim import SimImage
from llm_os.drivers.simulation.device import Device
from llm_os.drivers.simulation.fences import Fences
from llm_os.drivers.simulation.plan import STATE
from llm_os.drivers.simulation.state import State
from llm_os.drivers.simulation.violation import Violation
from llm_os.kernel import events as ev
from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, Extent, Placement, Sequence
from llm_os.kernel.errors import DriverError, StoreError
from llm_os.kernel.journal import Began, Took
from llm_os.kernel.request import Request

FRAME = 4096
PLACEMENT = Placement(extents=(Extent(0, 1), Extent(1, 1)), page_tokens=2, pages=16 * 8)
PAGES = (100, 101)


class Bench:
    """One model with two written pages."""

    def __init__(self, faults: Any, chooser: Any) -> None:
        config = Config(
            driver="sim",
            memory=16 * FRAME,
            frame_size=FRAME,
            swap_host=64 * FRAME,
            swap_disk=64 * FRAME,
            state=STATE,
        )
        self.device, self.fences = Device(config), Fences(config, 16)
        self.state = State(config, faults, chooser)
        self.state.boot(self.device, self.fences)
        image = SimImage.parse("sim:a?kv_bytes_per_token=256")
        load = ev.Load(1, "sim:a", image, PLACEMENT)
        self.fences.start(load)
        self.device.perform(load, None)
        self.fences.end(load, failed=False)
        self.tokens = (65, 66, 67, 68)
        self.device.run(Batch(model="sim:a", sequences=(self.rows(PAGES),))).result(0)

    def rows(self, pages: tuple[int, ...]) -> Sequence:
        return Sequence(pid=1, salt=7, tokens=self.tokens, position=0, pages=pages, sample=None)

    def contents(self, *pages: int) -> tuple[bytes, ...]:
        return self.device.swap_out("sim:a", pages).result(0)

    def put(self, tier: ev.Tier) -> None:
        self.state.swap(ev.SwapOut(2, "sim:a", PAGES, (1, 2), tier))

    def back(self) -> Any:
        return self.state.swap(ev.SwapIn(3, "sim:a", (1, 2), (50, 51)))


@pytest.fixture
def bench(faults: Any, chooser: Any) -> Bench:
    return Bench(faults, chooser)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_swapped_page_comes_back_as_it_was(bench, tier):
    bench.put(tier)
    assert bench.back() == (True, True)
    assert bench.contents(50, 51) == bench.contents(*PAGES) != bench.contents(60, 61)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_flipped_bit_in_swap_is_found_and_nothing_is_written(bench, faults, tier):
    bench.put(tier)
    faults.plan = {"swapped": "swap_flip"}
    assert bench.back() == (False, False)
    assert bench.contents(50, 51) == bench.contents(60, 61)


def test_a_demoted_page_comes_back_from_the_disk(bench, faults):
    bench.put("host")
    bench.state.swap(ev.Demote(4, "", (1, 2)))
    assert bench.back() == (True, True)
    faults.plan = {"read": "io_error"}
    assert bench.back() == (False, False)


def test_a_full_disk_fails_the_swap_and_leaves_nothing(bench, faults):
    faults.plan = {"write": "disk_full"}
    with pytest.raises(StoreError):
        bench.put("disk")
    bench.state.check()


def test_a_flipped_cell_is_never_swapped(bench, chooser):
    bench.device.chooser = chooser
    assert bench.device.flip()
    with pytest.raises(DriverError):
        bench.put("host")


def test_a_slot_that_was_never_stored_cannot_be_asked_for(bench):
    with pytest.raises(Violation, match="swap slot"):
        bench.back()


def test_a_slot_number_is_not_used_twice(bench):
    bench.state.expect((1, 2), PAGES)
    with pytest.raises(Violation, match="swap slot"):
        bench.state.expect((2,), (100,))


def test_slots_that_stay_at_the_end_are_told(bench):
    bench.put("host")
    with pytest.raises(Violation, match="baseline"):
        bench.state.check()
    bench.state.discard((1, 2))
    bench.state.check()


def test_a_crash_while_the_journal_is_written_keeps_what_was_acknowledged(bench, faults, chooser):
    request = Request(model="sim:a", prompt="x")
    bench.state.append(ev.Journal(5, (Began(1, request, 3, (120,)), Took(1, (65,)))))
    for power in range(4):
        chooser.choose = lambda bound, power=power: power
        faults.plan = {"lost": "torn_write"}
        bench.state.crash([ev.Journal(6, (Took(1, (66,)),))])
        faults.plan = {}
        (session,) = bench.state.boot(bench.device, bench.fences).values()
        tokens = [token for took in session.since for token in took.tokens]
        assert tokens[0] == 65 and set(tokens[1:]) <= {66}
    assert tokens[-1] == 66, "the last one had the power to end"


def test_a_disk_that_fails_at_boot_is_tried_again(bench, faults):
    bench.state.crash([])
    faults.plan = {"sync": "io_error"}
    faults.at = lambda place, at=faults.at: None if faults._paused else at(place)
    assert bench.state.boot(bench.device, bench.fences) == {}
