"""The sim driver as a device that breaks: operations fail, rows fail, cells flip, and one day it is lost.

A cell that flipped is found by whoever reads it, as by memory with ECC: a row that would read it answers RowError and
writes nothing; a copy of its page carries it on; a swap of its page fails. Writing it makes it sound again. So no
answer may ever contain what a flipped cell made of it. A lost device fails whatever is asked of it from then on, and
what was in flight.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from llm_os.drivers.sim import SimDriver, SimImage
from llm_os.drivers.simulation.chooser import Chooser
from llm_os.kernel import events as ev
from llm_os.kernel.driver import Batch, Row, RowError
from llm_os.kernel.driver import Sequence as Rows
from llm_os.kernel.errors import DriverError

_FLIPPED = 1 << 64  # no sound cell has this value


class Device(SimDriver):
    """A SimDriver that performs operations of the core at the moment they are said to end, with a fault or without."""

    chooser: Chooser
    lost = False
    flipped = False

    def perform(self, operation: ev.Operation, fault: str | None) -> Any:
        """The result of a device operation other than a swap. Raises what the driver's future would."""
        self.fail(fault)
        match operation:
            case ev.Run(_, batch):
                rows = self.run(batch).result(0)
                return self._spoil(batch, rows, fault)
            case ev.Copy(_, model, moves):
                return self.copy(model, moves).result(0)
            case ev.Load(_, model, image, placement):
                return self.load(model, image, placement).result(0)
            case ev.Unload(_, model):
                return self.unload(model).result(0)
            case ev.Release(_, model):
                return self.release(model).result(0)
            case ev.Prefetch(_, model, image):
                return self.prefetch(model, image).result(0)
        raise TypeError(f"{operation} is no operation of a device")

    def fail(self, fault: str | None) -> None:
        """Raises what the fault makes of any call."""
        if self.lost:
            raise DriverError("the device was lost (simulated)")
        if fault == "allocation":
            raise MemoryError("cannot allocate (simulated)")
        if fault == "out_of_memory":
            raise DriverError("out of device memory (simulated)")
        if fault == "step_error":
            raise RuntimeError("illegal instruction (simulated)")

    def flip(self) -> bool:
        """Flip a bit of a cell that holds something. False if there is none."""
        full = [key for key, cells in self._pages.items() if any(cells)]
        if not full or self.lost:
            return False
        cells = self._pages[self.chooser.pick(full)]
        cells[self.chooser.pick([n for n, cell in enumerate(cells) if cell])] = _FLIPPED
        self.flipped = True
        return True

    def _spoil(self, batch: Batch, rows: tuple[Row, ...], fault: str | None) -> Any:
        if fault == "nan_row":
            bad = self.chooser.below(len(rows))
            fed, size = batch.sequences[bad], self._placement(batch.model)[0].page_tokens
            for position in range(fed.position, fed.end):
                self._write(batch.model, fed.pages[position // size])[position % size] = 0
            return (*rows[:bad], RowError("not a number (simulated)"), *rows[bad + 1 :])
        if fault == "wrong_rows":
            return (rows[:-1], (*rows, None), None, "rows", tuple(None for _ in rows), 7)[self.chooser.below(6)]
        return rows

    def _row(self, model: str, image: SimImage, size: int, rows: Rows) -> Row:
        if self.flipped:
            for index, page in enumerate(rows.pages[: -(-rows.position // size)]):
                if _FLIPPED in self._read(model, page)[: rows.position - index * size]:
                    return RowError(f"page {page} of {model} has a cell that cannot be read (simulated)")
        return super()._row(model, image, size, rows)

    def swap_out(self, model: str, pages: tuple[int, ...]) -> Future[tuple[bytes, ...]]:
        if self.flipped and any(_FLIPPED in self._read(model, page) for page in pages):
            raise DriverError(f"a page of {model} has a cell that cannot be read (simulated)")
        return super().swap_out(model, pages)
