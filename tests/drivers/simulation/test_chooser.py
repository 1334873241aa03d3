"""A run is its decisions: what was logged can be played, and what is missing is the dullest choice."""

from __future__ import annotations

from llm_os.drivers.simulation.chooser import Chooser


def choices(chooser: Chooser) -> list[object]:
    made: list[object] = []
    for _ in range(5):
        chooser.turn()
        made += [chooser.below(10), chooser.which([0.3, 0.6]), chooser.delay(100), chooser.pick("abc")]
    return made


def test_a_script_repeats_what_was_logged_whatever_the_seed():
    first = Chooser(1)
    made = choices(first)
    assert choices(Chooser(2, first.log)) == made
    assert choices(Chooser(2)) != made


def test_what_a_script_lacks_is_zero():
    assert choices(Chooser(1, [])) == [0, 0, 0, "a"] * 5


def test_a_turn_that_is_left_out_does_not_shift_the_decisions_of_others():
    first = Chooser(1)
    made = choices(first)
    script = [*first.log[:2], [], *first.log[3:]]
    assert choices(Chooser(1, script)) == [*made[:4], 0, 0, 0, "a", *made[8:]]


def test_a_decision_beyond_its_bound_is_brought_within():
    chooser = Chooser(1, [[99, 99]])
    assert chooser.below(5) == 4 and chooser.which([0.5]) == 1
