"""The contract of policies as tests (`kernel/policy.py`): numbers, purely, and every process comes to its end."""

from __future__ import annotations

import copy
import math

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llm_os.kernel.policy import Candidate, Policy, Share
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
_SECONDS = st.floats(0, 1e9)
_SHARES = st.builds(Share, tenant=st.text(max_size=8), weight=st.floats(0.001, 1000), service=st.floats(0, 1e15))
_CANDIDATES = st.builds(
    Candidate,
    pid=st.integers(1, 2**31),
    tenant=st.text(max_size=8),
    model=st.text(min_size=1, max_size=8),
    nice=st.integers(-20, 19),
    prompt_tokens=st.integers(1, 2**31),
    max_tokens=st.integers(1, 2**31),
    submitted=_SECONDS,
    deadline=st.none() | _SECONDS,
)


class PolicyConformance:
    """Inherit from it, and say what is to be tested:

    class TestMine(llm_os.testing.PolicyConformance):
        def make(self): return MyPolicy()
    """

    def make(self) -> Policy:
        """A new one."""
        raise NotImplementedError(f"{type(self).__name__} has to say which policy it tests: def make(self)")

    @_EXAMPLES
    @given(_SHARES)
    def test_a_share_is_a_finite_number_and_the_same_again(self, share: Share) -> None:
        policy = self.make()
        first = policy.share(share)
        assert isinstance(first, int | float) and math.isfinite(first), f"share gave {first!r} for {share}"
        policy.share(Share(tenant="other", weight=1.0, service=7.0))
        assert policy.share(copy.copy(share)) == first, "share has to be a function of its argument"

    @_EXAMPLES
    @given(_CANDIDATES)
    def test_a_rank_is_a_finite_number_and_the_same_again(self, candidate: Candidate) -> None:
        policy = self.make()
        first = policy.rank(candidate)
        assert isinstance(first, int | float) and math.isfinite(first), f"rank gave {first!r} for {candidate}"
        assert policy.rank(copy.copy(candidate)) == first, "rank has to be a function of its argument"

    def test_every_process_comes_to_its_end_with_the_tokens_of_a_lone_one(self) -> None:
        """Eight at once, of three tenants, in a kernel that serves two at a time and has to preempt."""
        machine = Machine(policy=self.make(), batch_size=2, memory="8MiB")
        for pid in range(1, 9):
            tenant = "abc"[pid % 3]
            machine.submit(pid, "word " * (5 * pid), tenant=tenant, nice=pid % 2, sampling={"max_tokens": 4 + pid})
        machine.settle()
        for pid in range(1, 9):
            assert machine.end(pid) == "length"
            assert machine.tokens(pid) == machine.expected(pid), "a policy decides who is first, never what is said"
