"""The contract of drafters as tests (`kernel/drafter.py`): ids within the limit, from one process's text alone."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llm_os.drivers.sim import SimImage
from llm_os.kernel.drafter import DraftContext, Drafter
from llm_os.testing.machine import Machine

_EXAMPLES = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.differing_executors],  # the suite is made to be inherited
)
_TOKENS = st.integers(0, 9) | st.integers(0, 255)
_PIECES = st.lists(st.lists(_TOKENS, max_size=30), min_size=1, max_size=12)


def guesses(drafter: Drafter, pid: int, pieces: Sequence[Sequence[int]], limit: int) -> list[tuple[int, ...]]:
    """What is guessed after each piece of one process's text."""
    image = SimImage.parse("sim:a")
    draft = drafter.open(DraftContext(pid=pid, tenant=f"tenant {pid}", model=image.name, image=image))
    return [] if draft is None else [tuple(draft.guess(piece, limit)) for piece in pieces]


class DrafterConformance:
    """Inherit from it, and say what is to be tested:

    class TestMine(llm_os.testing.DrafterConformance):
        def make(self): return MyDrafter()
    """

    def make(self) -> Drafter:
        """A new one."""
        raise NotImplementedError(f"{type(self).__name__} has to say which drafter it tests: def make(self)")

    @_EXAMPLES
    @given(_PIECES, st.integers(1, 20))
    def test_it_guesses_token_ids_and_no_more_than_the_limit(self, pieces: list[list[int]], limit: int) -> None:
        for found in guesses(self.make(), 1, pieces, limit):
            assert len(found) <= limit, f"{len(found)} guesses, {limit} were asked for"
            assert all(type(token) is int and 0 <= token < 257 for token in found), found

    @_EXAMPLES
    @given(_PIECES, _PIECES)
    def test_one_process_is_not_told_what_another_has_said(self, one: list[list[int]], other: list[list[int]]) -> None:
        drafter = self.make()
        alone = guesses(self.make(), 2, one, 9)
        guesses(drafter, 1, other, 9)
        assert guesses(drafter, 2, one, 9) == alone, "tenants would learn of each other's text, by how quick they are"

    def test_every_process_gets_the_tokens_of_a_lone_one(self) -> None:
        machine = Machine(drafters=[self.make()], speculation="always", batch_size=3, memory="8MiB")
        for pid in range(1, 7):
            sampling = {"max_tokens": 20 + pid, "temperature": pid % 2}
            machine.submit(pid, "again and " * pid, tenant="ab"[pid % 2], sampling=sampling)
        machine.settle()
        for pid in range(1, 7):
            assert machine.tokens(pid) == machine.expected(pid)
