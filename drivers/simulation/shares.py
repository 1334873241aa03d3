"""Fair share, judged by what is fed and answered: the kernel's own counters are not looked at.

The bound is that of `kernel/accounting.py`, in what can be seen of batches. It is judged on machines with a backlog:
one model, no prefix cache, and room for all that can be active, so that nobody is suspended. Of two tenants i and f
with requests of one class, both with one waiting at every moment from t0 to t,

    served_i / w_i - served_f / w_f  <=  U_i + U_f + (ended_i / w_i + ended_f / w_f)

    served  INPUT for each token of a prompt that was fed for the first time, OUTPUT for each of an answer, since t0
    U       (INPUT * (1 + batch_size) * prompt + OUTPUT * batch_size * answer) / w: the longest of each
    ended   since t0: what a process had not been fed when it was cancelled or failed, and tokens that were under way

The kernel counts a prompt when its process is admitted, which nobody sees, this judge when it is fed: hence batch_size
prompts more in U. U_f is there for what f may owe at t0: who waits is behind whoever was admitted last by no more than
that. A tenant has one waiting if more than batch_size of its requests have their tokens and have never been in a batch:
at most batch_size of them can have been admitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import permutations
from typing import NamedTuple

from llm_os.drivers.simulation.plan import Plan
from llm_os.drivers.simulation.story import Story
from llm_os.drivers.simulation.violation import insist
from llm_os.kernel.accounting import INPUT, OUTPUT
from llm_os.kernel.config import Tenant
from llm_os.kernel.driver import Sequence as Rows


class _Window(NamedTuple):
    """Since when two tenants have been waiting, and what had been by then. Weighted."""

    ahead: float  # of the first before the second
    ended: float  # of both


class Shares:
    """Of one life."""

    def __init__(self, plan: Plan) -> None:
        self._judged = plan.backlog > 0
        self._slots = plan.config.batch_size
        self._under_way = 1 if plan.config.speculation == "off" else 1 + plan.config.draft_tokens
        limits = plan.config.tenants
        self._weights = {tenant: limits.get(tenant, Tenant()).weight for tenant in plan.tenants}
        free = (None, None, None)
        bounded = {name for name, t in limits.items() if (t.max_tokens, t.max_pages, t.max_processes) != free}
        self._odd = {*bounded}  # tenants with requests of several classes, forks, or limits
        self._nice: dict[str, int] = {}
        self._fed: Counter[int] = Counter()  # of a process, counted from its beginning
        self._served: dict[str, float] = dict.fromkeys(plan.tenants, 0.0)  # weighted, as what follows
        self._ended: dict[str, float] = dict.fromkeys(plan.tenants, 0.0)
        self._prompt: Counter[str] = Counter()  # the longest, in tokens
        self._answer: Counter[str] = Counter()
        self._waited: set[int] = set()  # who waited after the last step
        self._windows: dict[tuple[str, str], _Window] = {}

    def fed(self, story: Story, rows: Rows) -> None:
        end = rows.position + len(rows.tokens)
        self._serve(story, INPUT * max(0, min(end, len(story.prompt)) - self._fed[story.pid]))
        self._fed[story.pid] = max(self._fed[story.pid], end)

    def answered(self, story: Story, tokens: int) -> None:
        if not story.killed and story.ended is None:
            self._serve(story, OUTPUT * tokens)

    def ended(self, story: Story) -> None:
        if self._judged and story.request.tenant in self._weights and story.ended not in ("stop", "length"):
            unfed = max(0, len(story.prompt) - self._fed[story.pid])
            self._ended[story.request.tenant] += self._weigh(story, INPUT * unfed + OUTPUT * self._under_way)

    def stepped(self, live: Iterable[Story]) -> None:
        """After every step."""
        if not self._judged:
            return
        waiting, waited = Counter[str](), self._waited
        self._waited = set()
        for story in live:
            tenant = story.request.tenant
            if tenant not in self._weights:
                continue
            self._know(story, tenant)
            if story.ready is None or story.ran_first or story.killed or story.excused or story.blocked:
                continue
            self._waited.add(story.pid)
            waiting[tenant] += story.pid in waited
        for pair in permutations(sorted(self._weights), 2):
            self._compare(pair, waiting)

    def _compare(self, pair: tuple[str, str], waiting: Counter[str]) -> None:
        one, other = pair
        ahead, ended = self._served[one] - self._served[other], self._ended[one] + self._ended[other]
        plain = self._odd.isdisjoint(pair) and self._nice.get(one) == self._nice.get(other)
        if not plain or min(waiting[one], waiting[other]) <= self._slots:
            self._windows.pop(pair, None)
            return
        window = self._windows.setdefault(pair, _Window(ahead, ended))
        bound = self._most(one) + self._most(other) + ended - window.ended
        gap = ahead - window.ahead
        insist(gap <= bound, "share", f"{one!r} was served {gap:g} more than {other!r}; {bound:g} is the bound")

    def _know(self, story: Story, tenant: str) -> None:
        request = story.request
        hurried = request.deadline_s is not None or request.queue_s is not None
        if story.forked or story.given or hurried or self._nice.setdefault(tenant, request.nice) != request.nice:
            self._odd.add(tenant)
        self._prompt[tenant] = max(self._prompt[tenant], len(story.prompt))
        answer = story.image.context_length if request.sampling.max_tokens is None else request.sampling.max_tokens
        self._answer[tenant] = max(self._answer[tenant], answer)

    def _most(self, tenant: str) -> float:
        """U of the bound."""
        most = INPUT * (1 + self._slots) * self._prompt[tenant] + OUTPUT * self._slots * self._answer[tenant]
        return most / self._weights[tenant]

    def _serve(self, story: Story, cost: float) -> None:
        if self._judged and story.request.tenant in self._weights:
            self._served[story.request.tenant] += self._weigh(story, cost)

    def _weigh(self, story: Story, cost: float) -> float:
        return cost / self._weights[story.request.tenant]
