"""Models that are wanted come, in whatever order operations end."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from llm_os.kernel import events as ev

A, B = (
    f"sim:{m}&layer_bytes=1048576&kv_bytes_per_token=4096&context_length=2000" for m in ("a?layers=4", "b?layers=5")
)


@pytest.mark.parametrize("order", list(permutations(("Prefetch", "Unload", "Copy"))), ids="-".join)
def test_kv_of_one_who_is_blocked_goes_for_another_model_whatever_ends_first(
    machine: type[Any], order: tuple[str, ...]
) -> None:
    m = machine(memory="6656KiB")
    m.submit(1, "x" * 500, model=A, sampling={"max_tokens": 40})
    m.until(ev.Run)
    m.complete()
    m.post(ev.Block(70, 1))
    m.settle()
    assert m.replies[70].error is None
    m.submit(2, "y" * 300, model=B, sampling={"max_tokens": 3})
    while m.pending:
        names = [type(operation).__name__ for operation in m.pending]
        m.complete(min(range(len(names)), key=lambda i: order.index(names[i]) if names[i] in order else -1))
    assert m.end(2) == "length" and m.tokens(2) == m.expected(2)
    m.post(ev.Unblock(71, 1))
    m.settle()
    assert m.end(1) == "length" and m.tokens(1) == m.expected(1)
