"""A model that cannot be loaded yet is brought near; where that fails, it is not tried again and again."""

from __future__ import annotations

from typing import Any

from llm_os.kernel import events as ev
from llm_os.kernel.errors import DriverError


def failing(machine: type[Any]) -> tuple[Any, list[ev.Prefetch]]:
    """A machine with room for one model, on which nothing can be brought near; and what was tried."""
    m, tried = machine(memory="6MiB"), []

    def refuse(operation: ev.Operation) -> None:
        if isinstance(operation, ev.Prefetch):
            tried.append(operation)
            raise DriverError("the file cannot be read ahead")

    m.refuse = refuse
    return m, tried


def test_a_prefetch_that_fails_is_not_begun_again_while_another_model_runs(machine: type[Any]) -> None:
    m, tried = failing(machine)
    m.submit(1, sampling={"max_tokens": 40}, nice=-5)
    m.until(ev.Run)
    m.submit(2, model="sim:b")
    for _ in range(20):
        m.complete()
    assert len(tried) == 1
    m.settle()
    assert m.end(2) == "length" and m.tokens(2) == m.expected(2)


def test_who_asks_for_it_by_name_has_it_tried_again(machine: type[Any]) -> None:
    m, tried = failing(machine)
    for ticket in (1, 2):
        m.post(ev.LoadModel(ticket, "sim:a", prefetch=True))
        m.settle()
    assert len(tried) == 2
