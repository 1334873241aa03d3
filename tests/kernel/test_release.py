"""KV memory that the device fails to give back."""

from __future__ import annotations

from typing import Any

from llm_os.kernel import events as ev
from llm_os.kernel.errors import DriverError


def test_a_release_that_failed_is_asked_for_again_before_the_model_is_loaded_again(machine: type[Any]) -> None:
    m, asked = machine(), []

    def refuse(operation: ev.Operation) -> None:
        if isinstance(operation, ev.Load | ev.Release):
            asked.append(type(operation).__name__)
            if asked.count("Release") == 1 and asked[-1] == "Release":
                raise DriverError("the device is busy")

    m.refuse = refuse
    m.submit(1)
    m.settle()
    m.post(ev.UnloadModel(70, "sim:a"))
    m.settle()
    assert "the device is busy" in str(m.replies[70].error)
    m.submit(2)
    m.settle()
    assert asked == ["Load", "Release", "Release", "Load"]
    assert m.end(2) == "length" and m.tokens(2) == m.expected(2)
    m.post(ev.UnloadModel(71, "sim:a"))
    m.settle()
    assert m.replies[71].error is None and asked[4:] == ["Release"]
