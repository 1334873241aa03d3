"""Who is served first: the contract of scheduling policies. The classes of `nice`, aging and preemption are the
scheduler's; a policy orders those who are of one class.

    order of the waiting = (class, policy.share(tenant), policy.rank(process), since when it waits, pid)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from llm_os.kernel.config import Config


class Share(Struct, frozen=True, kw_only=True):
    """What a tenant has had."""

    tenant: str
    weight: float  # Tenant.weight
    service: float  # virtual tokens that it was served, divided by its weight (`kernel/accounting.py`)


class Candidate(Struct, frozen=True, kw_only=True):
    """A process that begins to wait."""

    pid: int
    tenant: str
    model: str
    nice: int
    prompt_tokens: int
    max_tokens: int  # the most that its answer may have
    submitted: float  # seconds, on the kernel's clock
    deadline: float | None  # on the same clock


class Policy(Protocol):
    """Called in the kernel's thread, for every turn: a pure function of its argument, quick, without any lock, file or
    socket. One that raises, answers no finite number or takes too long is replaced by "fair"."""

    def share(self, share: Share) -> float:
        """Of two tenants of one class, the one with the lower number is served first. Called for every tenant that
        waits, whenever somebody can be admitted."""
        ...

    def rank(self, candidate: Candidate) -> float:
        """Of two processes of one tenant and class, the one with the lower number is served first; of equals, who has
        waited longest. Called once each time that a process begins to wait."""
        ...


class Fair:
    """Equal shares for tenants of equal weight, by the virtual token counter of `kernel/accounting.py`; within a tenant
    first come, first served. The default, and what takes over from a policy that fails."""

    def share(self, share: Share) -> float:
        return share.service

    def rank(self, candidate: Candidate) -> float:
        return 0.0


PolicyFactory = Callable[["Config"], Policy]
