"""Every byte of the swap file is free or somebody's, once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_os.drivers.persistence.extents import BLOCK, Extents


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5 * BLOCK)), max_size=60))
def test_no_run_is_given_twice_and_everything_comes_together_again(steps: list[tuple[bool, int]]) -> None:
    extents, taken = Extents(), list[tuple[int, int]]()
    for take, size in steps:
        if take or not taken:
            taken.append((extents.take(size), size))
        else:
            extents.give(*taken.pop(size % len(taken)))
        extents.check(taken)
    for run in taken:
        extents.give(*run)
    extents.check([])
    assert extents.end == 0


def test_the_lowest_run_that_fits_is_taken_first() -> None:
    extents = Extents()
    runs = [(extents.take(size), size) for size in (BLOCK, BLOCK, 3 * BLOCK, BLOCK)]
    assert [offset for offset, _ in runs] == [0, BLOCK, 2 * BLOCK, 5 * BLOCK]
    extents.give(*runs[0])
    extents.give(*runs[2])
    assert (extents.take(2 * BLOCK), extents.take(1), extents.take(BLOCK)) == (2 * BLOCK, 0, 4 * BLOCK)
    assert extents.end == 6 * BLOCK


def test_a_run_that_was_never_given_out_is_noticed() -> None:
    extents = Extents()
    extents.take(BLOCK)
    with pytest.raises(AssertionError):
        extents.check([])
