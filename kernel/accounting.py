"""What each tenant has had, and what it may have: fair share by a virtual token counter, and quotas.

Fair share follows VTC (Sheng et al., "Fairness in serving large language models", OSDI 2024): a tenant's counter grows
by the tokens that it is served, divided by its weight: by INPUT for each token of a prompt when the process is admitted
to the running set, by OUTPUT for each token of an answer when it is there. Whoever is admitted next is of the tenant
with the lowest counter. A tenant that had nothing waiting and comes (back) starts no lower than the one that was
admitted last in its class, so nobody saves up. Unlike in the paper, tokens found in the prefix cache cost nothing, nor
do tokens that are computed again after a preemption.

The bound. From t0 to t, tenants i and f of one class have processes waiting for one model. Then

    c_i(t) - c_f(t) <= max(0, c_i(t0) - c_f(t0)) + U_i      U_i = (INPUT * prompt + OUTPUT * slots * answer) / weight_i

where prompt and answer are i's longest, and slots is Config.batch_size: i is admitted only while c_i <= c_f; that costs
it one prompt at once, and then the answers of its active processes, of which there are at most `slots`. So two tenants
of weight 1 that begin alike are never served amounts that differ by more than the greater of U_i and U_f, and those of
any time between by twice that. It is the paper's bound 2 max(w_p L_input, w_q M), with slots * answer in place of the
M tokens that fit in memory. Tenants that use different models of one device get turns in the order of their counters,
and stay within slots * (INPUT * prompt + OUTPUT * (1 + guesses)) / weight: so much is a turn. Models that do not fit
together change in that order too, but not before a slice has ended (`residency.py`): that adds what a tenant is served
in a slice.

Quotas are reserved when a request is admitted and settled when it ends: used + reserved <= quota at every moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llm_os.kernel.config import Tenant
from llm_os.kernel.errors import Refused
from llm_os.kernel.policy import Policy, Share

INPUT, OUTPUT = 1.0, 2.0  # the cost of a token, as in the paper
_REMEMBERED = 4096  # tenants without processes whose counters are kept


@dataclass(eq=False, slots=True)
class Account:
    """One tenant's figures."""

    name: str
    limits: Tenant
    counter: float = 0.0
    share: tuple[float, float] | None = None  # a counter, and what the policy made of it
    waiting: int = 0  # processes that wait to be admitted to the running set
    processes: int = 0  # live
    restored: int = 0  # of these, from an earlier life
    used_tokens: int = 0  # of processes that have ended
    reserved_tokens: int = 0
    reserved_pages: int = 0


@dataclass(eq=False, slots=True)
class Reservation:
    """What one process may still use."""

    account: Account
    restored: bool = False
    tokens: int = 0
    pages: int = 0


class Accounting:
    """The accounts of all tenants."""

    def __init__(self, tenants: Mapping[str, Tenant], policy: Policy) -> None:
        self._limits = tenants
        self._policy = policy
        self._accounts: dict[str, Account] = {}
        self._last: dict[int, float] = {}  # by nice: the counter of the tenant that was admitted last

    def share(self, tenant: str) -> float:
        """Its place among the tenants, by the policy: the least is first."""
        account = self._accounts[tenant]
        if account.share is None or account.share[0] != account.counter:
            had = Share(tenant=tenant, weight=account.limits.weight, service=account.counter)
            account.share = account.counter, self._policy.share(had)
        return account.share[1]

    def enter(self, tenant: str, restored: bool = False) -> Reservation:
        """A process arrives. Raises Refused if its tenant has as many as it may; one that was admitted in an earlier
        life has been counted then."""
        account = self._accounts.get(tenant)
        if account is None:
            self._forget_some()
            account = self._accounts[tenant] = Account(tenant, self._limits.get(tenant, Tenant()))
        most = account.limits.max_processes
        if most is not None and account.processes >= most and not restored:
            raise Refused(f"tenant {tenant!r} has {account.processes} live processes, the most that its quota allows")
        account.processes += 1
        account.restored += restored
        return Reservation(account, restored)

    def reserve(self, reservation: Reservation, prompt: int, answer: int | None, page_tokens: int) -> int | None:
        """Set aside the tokens and pages of a request; `answer` None is an open end. Returns how long the answer may be
        at most, None for any length. Raises Refused, reserving nothing."""
        account = reservation.account
        limits = account.limits
        most = answer
        if limits.max_tokens is not None:
            left = limits.max_tokens - account.used_tokens - account.reserved_tokens
            if prompt + (answer or 1) > left:
                raise Refused(
                    f"tenant {account.name!r} has {left} of its {limits.max_tokens} tokens left; the request needs "
                    f"{prompt + (answer or 1)}"
                )
            most = left - prompt if answer is None else answer
        if limits.max_pages is not None:
            left = limits.max_pages - account.reserved_pages
            needed = -(-(prompt + (answer or 1)) // page_tokens)
            if needed > left:
                raise Refused(
                    f"tenant {account.name!r} has {left} of its {limits.max_pages} KV pages left; the request needs "
                    f"{needed} of {page_tokens} tokens each"
                )
            if answer is None:
                fitting = left * page_tokens - prompt
                most = fitting if most is None else min(most, fitting)
        total = prompt + (most or 0)
        if limits.max_tokens is not None:
            reservation.tokens = total
            account.reserved_tokens += total
        if limits.max_pages is not None:
            reservation.pages = -(-total // page_tokens)
            account.reserved_pages += reservation.pages
        return most

    def extend(self, reservation: Reservation, tokens: int, total: int, page_tokens: int) -> None:
        """So many more tokens, `total` of that process then. Raises Refused, reserving nothing."""
        account = reservation.account
        limits = account.limits
        pages = max(0, -(-total // page_tokens) - reservation.pages)
        if limits.max_tokens is not None:
            left = limits.max_tokens - account.used_tokens - account.reserved_tokens
            if tokens > left:
                raise Refused(f"tenant {account.name!r} has {left} of its {limits.max_tokens} tokens left")
        if limits.max_pages is not None and account.reserved_pages + pages > limits.max_pages:
            raise Refused(f"tenant {account.name!r} has used up its {limits.max_pages} KV pages")
        if limits.max_tokens is not None:
            reservation.tokens += tokens
            account.reserved_tokens += tokens
        if limits.max_pages is not None:
            reservation.pages += pages
            account.reserved_pages += pages

    def settle(self, reservation: Reservation, used: int) -> None:
        """A process ended after `used` tokens: what it did not use is free for others."""
        account = reservation.account
        account.processes -= 1
        account.restored -= reservation.restored
        account.reserved_tokens -= reservation.tokens
        account.reserved_pages -= reservation.pages
        if account.limits.max_tokens is not None:
            account.used_tokens += min(used, reservation.tokens)
        reservation.tokens = reservation.pages = 0

    def arrived(self, tenant: str, nice: int) -> None:
        """A process comes to wait in the class `nice`, from outside."""
        account = self._accounts[tenant]
        if not account.waiting:
            account.counter = max(account.counter, self._last.get(nice, 0.0))

    def waits(self, tenant: str, change: int) -> None:
        """One process more (1) or less (-1) waits to be admitted."""
        self._accounts[tenant].waiting += change

    def admitted(self, tenant: str, nice: int, prompt_tokens: int) -> None:
        """A process of the class `nice` is to run; so many tokens of its prompt have not been paid for."""
        account = self._accounts[tenant]
        self._last[nice] = max(account.counter, self._last.get(nice, 0.0))
        account.counter += INPUT * prompt_tokens / account.limits.weight

    def answered(self, tenant: str, tokens: int) -> None:
        account = self._accounts[tenant]
        account.counter += OUTPUT * tokens / account.limits.weight

    def check(self) -> None:
        for account in self._accounts.values():
            limits, processes = account.limits, account.processes
            assert 0 <= account.waiting <= processes
            assert account.reserved_tokens >= 0 and account.reserved_pages >= 0
            within = limits.max_processes is None or processes - account.restored <= limits.max_processes
            if (most := limits.max_tokens) is not None:
                within &= account.used_tokens + account.reserved_tokens <= most
            if (most := limits.max_pages) is not None:
                within &= account.reserved_pages <= most
            assert within, f"tenant {account.name!r} is over its quota"

    def _forget_some(self) -> None:
        """Tenants that have gone, and whose counters are no higher than anybody's would be who comes now."""
        if len(self._accounts) > _REMEMBERED:
            gone = [a for a in self._accounts.values() if not a.processes and a.name not in self._limits]
            for account in gone[: len(gone) // 2]:
                del self._accounts[account.name]
