"""What the simulator sees of pages and frames from outside, without believing the kernel's own ledger."""

from __future__ import annotations

import pytest

from llm_os.drivers.sim import SimImage
from llm_os.drivers.simulation.fences import Fences
from llm_os.drivers.simulation.violation import Violation
from llm_os.kernel import events as ev
from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, Extent, Move, Placement, Sequence

FRAME = 4096
IMAGE = SimImage.parse("sim:a?kv_bytes_per_token=512")  # pages of 2 tokens: four to a frame


def placement(*extents: Extent) -> Placement:
    return Placement(extents=extents, page_tokens=2, pages=16 * 4)


def load(id: int, model: str, *extents: Extent) -> ev.Load:
    return ev.Load(id, model, IMAGE, placement(*extents))


def row(pid: int, pages: tuple[int, ...], position: int = 0, tokens: int = 2, salt: int = 7) -> Sequence:
    return Sequence(pid=pid, salt=salt, tokens=(65,) * tokens, position=position, pages=pages, sample=None)


def run(id: int, *rows: Sequence, model: str = "a") -> ev.Run:
    return ev.Run(id, Batch(model=model, sequences=rows))


@pytest.fixture
def fences() -> Fences:
    """With model `a` in frames 0 and 1."""
    fences = Fences(Config(driver="sim", memory=16 * FRAME, frame_size=FRAME, batch_tokens=8, batch_size=2), 16)
    perform(fences, load(1, "a", Extent(0, 1), Extent(1, 1)))
    return fences


def perform(fences: Fences, *operations: ev.Operation) -> None:
    for operation in operations:
        fences.start(operation)
        fences.end(operation, failed=False)


def refused(fences: Fences, operation: ev.Operation, what: str) -> None:
    with pytest.raises(Violation, match=what):
        fences.start(operation)


def test_a_page_in_flight_is_not_written_by_another_operation(fences):
    perform(fences, run(2, row(1, (40,))))
    fences.start(run(3, row(1, (40, 41), 2)))
    refused(fences, ev.Copy(4, "a", (Move(50, 40),)), "fence: page 40 .* names it")
    refused(fences, ev.SwapIn(5, "a", (1,), (41,)), "fence: page 41")
    fences.end(run(3, row(1, (40, 41), 2)), failed=False)
    fences.start(ev.Copy(6, "a", (Move(50, 40),)))


def test_a_page_that_is_being_written_is_not_read(fences):
    fences.start(run(2, row(1, (40,))))
    refused(fences, ev.SwapOut(3, "a", (40,), (1,), "host"), "fence: page 40 .* being written")


def test_a_shared_page_may_be_read_by_two_and_written_by_none(fences):
    perform(fences, run(2, row(1, (40,))))
    perform(fences, run(3, row(1, (40, 41), 2), row(2, (40, 42), 2)))
    refused(fences, run(4, row(1, (40, 41), 3, 1), row(2, (40, 41, 43), 4)), "shared page")


def test_a_page_is_read_by_its_own_tenant_only(fences):
    perform(fences, run(2, row(1, (40,))))
    refused(fences, run(3, row(2, (40, 41), 2, salt=8)), "tenant")


def test_a_copied_page_stays_its_tenants(fences):
    perform(fences, run(2, row(1, (40,))), ev.Copy(3, "a", (Move(40, 44),)))
    refused(fences, run(4, row(2, (44, 45), 2, salt=8)), "tenant")


def test_frames_have_one_owner(fences):
    refused(fences, load(2, "b", Extent(1, 2)), "frame: 1 is given to b and is of a")
    refused(fences, load(3, "c", Extent(2, 2), Extent(3, 1)), "overlap")
    refused(fences, load(4, "d", Extent(15, 2)), "budget")
    refused(fences, run(5, row(1, (4,))), "lies in the weights of a")


def test_weights_do_not_come_over_pages_in_flight(fences):
    fences.start(run(2, row(1, (40,))))
    refused(fences, load(3, "b", Extent(10, 1)), "fence: frame of page 40")


def test_weights_stay_while_a_batch_runs(fences):
    fences.start(run(2, row(1, (40,))))
    refused(fences, ev.Unload(3, "a"), "fence")


def test_pages_may_be_copied_while_weights_go(fences):
    fences.start(ev.Copy(2, "a", (Move(40, 44),)))
    perform(fences, ev.Unload(3, "a"))
    refused(fences, ev.Release(4, "a"), "fence")


def test_a_model_runs_only_while_it_is_loaded(fences):
    perform(fences, ev.Unload(2, "a"))
    refused(fences, run(3, row(1, (40,))), "not loaded")


def test_batches_keep_their_bounds(fences):
    refused(fences, run(2, row(1, (40, 41, 42, 43, 44), tokens=9)), "batch")
    refused(fences, run(3, row(1, (40,)), row(2, (41,)), row(3, (42,))), "batch")
    refused(fences, run(4, row(1, (40,), tokens=3)), "page table")


def test_kept_pages_keep_their_size(fences):
    perform(fences, ev.Unload(2, "a"))
    other = Placement(extents=(Extent(0, 1),), page_tokens=4, pages=32)
    refused(fences, ev.Load(3, "a", IMAGE, other), "change their size")
