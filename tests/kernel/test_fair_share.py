"""Who gets how much, and when: fair share, weights, classes, aging, slices, deadlines. A batch takes as long as it has
tokens, by a virtual clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_os.kernel import events as ev
from llm_os.kernel.accounting import INPUT, OUTPUT, Accounting
from llm_os.kernel.config import Tenant
from llm_os.kernel.policy import Fair

TOKEN_S, BATCH_S = 0.01, 0.01


class Arrival(NamedTuple):
    time: float
    tenant: str = ""
    prompt: int = 30
    answer: int = 10
    nice: int = 0
    model: str = "sim:a"


class Life:
    """A machine in virtual time. `served` is what each tenant was served, as the counters weigh it."""

    def __init__(self, machine: type[Any], arrivals: list[Arrival], load_s: float = 0.0, **config: Any) -> None:
        self.m = machine(**{"queue_limit": 10**6, "prefix_cache": False, **config})
        self.m.tick = 0.0
        self.m.core.check = lambda: None  # thousands of processes wait
        self.load_s = load_s
        self.to_come = sorted(arrivals)[::-1]
        self.served: Counter[str] = Counter()
        self.first_token: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self.loads: list[tuple[float, str]] = []  # when a model was there
        self.arrived = 0

    @property
    def now(self) -> float:
        return float(self.m.now)

    def until(self, time: float) -> Life:
        for _ in self.steps():
            if self.now >= time:
                break
        return self

    def steps(self) -> Iterator[None]:
        m = self.m
        while True:
            while self.to_come and self.to_come[-1].time <= m.now:
                self._arrive(self.to_come.pop())
            if m.pending:
                self._complete()
            else:
                times = [time for time in (m.core.wakeup, *(a.time for a in self.to_come[-1:])) if time is not None]
                if not times:
                    break
                m.now = max(m.now, min(times))
                m.post()
            yield
        type(m.core).check(m.core)

    def _arrive(self, arrival: Arrival) -> None:
        self.arrived += 1
        _, tenant, prompt, answer, nice, model = arrival
        self.m.submit(self.arrived, "p" * prompt, model, tenant=tenant, nice=nice, sampling={"max_tokens": answer})

    def _complete(self) -> None:
        m = self.m
        operation = m.pending[0]
        if isinstance(operation, ev.Load):
            m.now += self.load_s
            self.loads.append((self.now, operation.model))
        if isinstance(operation, ev.Run):
            m.now += BATCH_S + TOKEN_S * sum(len(rows.tokens) for rows in operation.batch.sequences)
            for rows in operation.batch.sequences:
                request = m.requests[rows.pid][0]
                fed = max(0, min(rows.position + len(rows.tokens), len(request.prompt)) - rows.position)
                self.served[request.tenant] += int(INPUT * fed + OUTPUT * (rows.sample is not None))
                if rows.sample is not None:
                    self.first_token.setdefault(rows.pid, self.now)
                    self.ended[rows.pid] = self.now
        m.complete()


def every(seconds: float, tenant: str, until: float, start: float = 0.0, **fields: Any) -> list[Arrival]:
    return [Arrival(start + i * seconds, tenant, **fields) for i in range(int((until - start) / seconds))]


BACKLOG = [*every(0.03, "many", 40), *every(0.3, "few", 40)]  # 10 : 1, and each more than the machine can do


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_two_backlogged_tenants_that_arrive_ten_to_one_get_the_same(machine: type[Any], batch_size: int) -> None:
    life = Life(machine, BACKLOG, batch_size=batch_size).until(40)
    assert abs(life.served["many"] - life.served["few"]) <= INPUT * 30 * (batch_size + 1) + OUTPUT * batch_size * 10
    if batch_size < 16:
        assert life.served["many"] == pytest.approx(life.served["few"], rel=0.05)


def test_first_come_first_served_would_not_pass(machine: type[Any]) -> None:
    life = Life(machine, BACKLOG, batch_size=4, policy="fifo").until(40)
    assert life.served["many"] > 5 * life.served["few"]


def test_fairness_costs_no_throughput(machine: type[Any]) -> None:
    fair = Life(machine, BACKLOG, batch_size=4).until(40)
    fifo = Life(machine, BACKLOG, batch_size=4, policy="fifo").until(40)
    assert fair.served.total() >= 0.95 * fifo.served.total()


def test_weights_three_to_one_give_three_to_one(machine: type[Any]) -> None:
    tenants = {"many": Tenant(weight=1.0), "few": Tenant(weight=3.0)}
    load = [*every(0.03, "many", 80), *every(0.1, "few", 80)]
    life = Life(machine, load, batch_size=4, tenants=tenants).until(80)
    assert life.served["few"] == pytest.approx(3 * life.served["many"], rel=0.05)


def test_tenants_of_different_models_on_the_device_get_the_same(machine: type[Any]) -> None:
    load = [*every(0.03, "many", 40), *every(0.3, "few", 40, model="sim:b")]
    life = Life(machine, load, batch_size=4).until(40)
    assert life.served["many"] == pytest.approx(life.served["few"], rel=0.05)


@pytest.mark.parametrize("idle", [True, False])
def test_who_comes_back_after_a_pause_has_saved_nothing_up(machine: type[Any], idle: bool) -> None:
    """`back` is here at the beginning, then pauses while `stays` works; from 30 s on both have more than enough."""
    load = [Arrival(0, "back", 5, 2), *every(0.2, "stays", 20 if idle else 60), *every(0.1, "back", 60, start=31)]
    load += every(0.1, "stays", 60, start=30) if idle else []
    life = Life(machine, load, batch_size=2).until(32)
    before = life.served.copy()
    life.until(58)
    served = life.served - before
    assert served["back"] == pytest.approx(served["stays"], rel=0.1)


@pytest.mark.parametrize("first", [True, False])
def test_who_was_alone_here_is_not_made_to_wait_for_it(machine: type[Any], first: bool) -> None:
    """`alone` had all there was, then nobody wanted anything; now it comes (back) with somebody who was never here."""
    load = [*every(0.5, "alone", 20), *every(0.1, "new", 60, start=40 if first else 40.01)]
    life = Life(machine, [*load, *every(0.1, "alone", 60, start=40)], batch_size=2).until(39)
    before = life.served.copy()
    life.until(58)
    served = life.served - before
    assert served["alone"] == pytest.approx(served["new"], rel=0.1)


requests = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=4, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests, requests, st.integers(1, 5), st.integers(4, 40), st.sampled_from([0.5, 1, 3]), st.integers(8, 200))
def test_the_gap_between_backlogged_tenants_is_bounded(
    machine: type[Any],
    a: list[tuple[int, int]],
    b: list[tuple[int, int]],
    slots: int,
    batch_tokens: int,
    weight: float,
    kv_frames: int,
) -> None:
    """The bound that stands in kernel/accounting.py, also where pages are short and processes lose theirs."""
    load = [Arrival(0, tenant, *each) for tenant, all_ in (("a", a), ("b", b)) for each in all_]
    weights = {"a": 1.0, "b": float(weight)}
    life = Life(
        machine,
        load,
        batch_size=slots,
        batch_tokens=batch_tokens,
        page_tokens=4,
        memory=(4 * 16 + 1 + max(14, kv_frames // 4)) * 2**16,
        tenants={"b": Tenant(weight=weight)},
    )
    bound = {
        tenant: (INPUT * max(p for p, _ in all_) + OUTPUT * slots * max(n for _, n in all_)) / weights[tenant]
        for tenant, all_ in (("a", a), ("b", b))
    }
    counter = life.m.core.accounting.share
    for _ in life.steps():
        live = life.m.core.processes.values()
        if all(any(p.table and not p.active and p.request.tenant == t for p in live) for t in "ab"):
            gap = counter("a") - counter("b")
            assert -bound["b"] <= gap <= bound["a"]
    for tenant, all_ in (("a", a), ("b", b)):
        assert counter(tenant) == pytest.approx(sum(INPUT * p + OUTPUT * n for p, n in all_) / weights[tenant])


# -- classes and aging -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tenant", ["", "other"])
def test_the_last_class_gets_on_after_39_times_aging_s_whatever_comes(machine: type[Any], tenant: str) -> None:
    urgent = every(0.2, "", 90, nice=-20)
    life = Life(machine, [*urgent, Arrival(1, tenant, nice=19)], batch_size=2, aging_s=1.0).until(90)
    pid = next(pid for pid, (request, _) in life.m.requests.items() if request.nice == 19)
    assert 1 + 39 <= life.first_token[pid] <= 1 + 39 + 3, "and not before, while there is not enough for the first"
    assert life.ended[pid] <= life.first_token[pid] + 3, "what it has gained it keeps"


def test_the_last_class_gets_on_also_with_a_model_of_its_own(machine: type[Any]) -> None:
    urgent = every(0.2, "", 90, nice=-20)
    low = Arrival(1, "other", nice=19, model="sim:b")
    life = Life(machine, [*urgent, low], batch_size=2, aging_s=1.0).until(90)
    pid = next(pid for pid, (request, _) in life.m.requests.items() if request.nice == 19)
    assert 1 + 38 <= life.first_token[pid] <= 1 + 39 + 3
    assert life.ended[pid] <= life.first_token[pid] + 3


def test_waiting_brings_no_tenant_before_another_of_its_class(machine: type[Any]) -> None:
    life = Life(machine, BACKLOG, batch_size=4, aging_s=0.1).until(40)
    assert life.served["many"] == pytest.approx(life.served["few"], rel=0.05)


@pytest.mark.parametrize("model", ["sim:a", "sim:b"])
def test_a_newcomer_of_a_better_class_goes_before_those_that_run(machine: type[Any], model: str) -> None:
    """Also when it needs another model, for which theirs has to go. What they answer does not change."""
    m = machine(memory=(4 * 16 + 1 + 60) * 2**16, batch_size=2, slice_s=1000.0)
    for pid in (1, 2, 3):
        m.submit(pid, "x" * 20, nice=5, sampling={"max_tokens": 40})
    m.until(ev.Run)
    for _ in range(4):
        m.complete()
    m.submit(4, "now", model, nice=-5, sampling={"max_tokens": 5})
    while not any(item.completion for item in m.deliveries[4]):
        m.complete()
    ended = [pid for pid in (1, 2, 3) if any(item.completion for item in m.deliveries[pid])]
    assert not ended and len(m.tokens(2)) < 15
    m.settle()
    assert all(m.end(pid) == "length" and m.tokens(pid) == m.expected(pid) for pid in (1, 2, 3, 4))


@pytest.mark.parametrize("tenants", ["xy", "xx"])
@pytest.mark.parametrize(("load_s", "slice_s"), [(0.01, 2.0), (0.2, 0.1)])
def test_models_that_do_not_fit_together_change_slowly_and_everybody_gets_on(
    machine: type[Any], load_s: float, slice_s: float, tenants: str
) -> None:
    """Not oftener than each slice, nor than ten times what the change costs, once that is known."""
    load = [*every(0.2, tenants[0], 40), *every(0.2, tenants[1], 40, model="sim:b")]
    life = Life(machine, load, load_s, memory=(4 * 16 + 1 + 60) * 2**16, batch_size=8, slice_s=slice_s).until(80)
    assert len(life.loads) > 12
    for (before, one), (after, other) in pairwise(life.loads[-6:]):
        assert one != other and after - load_s - before >= max(slice_s, 0.85 * 10 * 2 * load_s)
    if tenants == "xy":
        assert life.served["x"] == pytest.approx(life.served["y"], rel=0.2)
    life.until(10_000)
    assert len(life.ended) == life.arrived and not life.m.core.processes


# -- quotas ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 60),
    st.integers(0, 12),
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(0, 12)), max_size=40),
)
def test_what_is_used_and_reserved_is_never_more_than_the_quota(
    tokens: int, pages: int, processes: int, steps: list[tuple[int, int, int]]
) -> None:
    """An account beside the account: what was accepted always fits, what was refused would not have."""
    size = 4
    limits = Tenant(max_tokens=tokens, max_pages=pages, max_processes=processes)
    accounting = Accounting({"t": limits}, Fair())
    held: list[tuple[Any, int]] = []  # with the tokens of each
    used = 0
    for kind, one, other in steps:
        accounting.check()
        in_pages = sum(-(-total // size) for _, total in held)
        free, free_pages = tokens - used - sum(total for _, total in held), pages - in_pages
        if kind == 3 and held:
            reservation, total = held.pop(one % len(held))
            spent = min(other, total)
            accounting.settle(reservation, spent)
            used += spent
        elif kind == 2 and held:
            index = one % len(held)
            reservation, total = held[index]
            more = -(-(total + other) // size) - -(-total // size)
            fits = other <= free and more <= free_pages
            if fits:
                accounting.extend(reservation, other, total + other, size)
                held[index] = (reservation, total + other)
            else:
                with pytest.raises(Exception, match=r"left|used up"):
                    accounting.extend(reservation, other, total + other, size)
        elif len(held) >= processes:
            with pytest.raises(Exception, match="live processes"):
                accounting.enter("t")
        else:
            reservation = accounting.enter("t")
            answer = other or None
            if one + (other or 1) > free or -(-(one + (other or 1)) // size) > free_pages:
                with pytest.raises(Exception, match="left"):
                    accounting.reserve(reservation, one, answer, size)
                accounting.settle(reservation, 0)
            else:
                most = accounting.reserve(reservation, one, answer, size)
                assert most == (answer or min(free, free_pages * size) - one)
                held.append((reservation, one + most))
    accounting.check()


lives = st.lists(
    st.tuples(st.sampled_from(["submit", "fork", "block", "unblock", "complete", "complete"]), st.integers(1, 12)),
    max_size=40,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lives, st.integers(30, 150))
def test_a_quota_is_settled_to_the_token(machine: type[Any], steps: list[tuple[str, int]], quota: int) -> None:
    """With forks, and gifts to blocked processes: `core.check` looks at the account after every step, and in the end
    exactly what was not used can be had."""
    m = machine(tenants={"t": Tenant(max_tokens=quota)}, page_tokens=4)
    pids, gifts = 0, Counter[int]()
    for number, (what, size) in enumerate(steps):
        parent = size % pids + 1 if pids else 0
        match what:
            case "submit":
                pids += 1
                m.submit(pids, "p" * size, tenant="t", sampling={"max_tokens": 1 + size // 2})
            case "fork" if parent:
                pids += 1
                m.fork(pids, parent)
            case "block" if parent:
                m.post(ev.Block(1000 + number, parent))
            case "unblock" if parent:
                m.post(ev.Unblock(2000 + number, parent, (97,) * size))
                if m.replies[2000 + number].error is None:
                    gifts[parent] += size
            case "complete" if m.pending:
                m.complete()
    m.settle()
    for pid in list(m.core.processes):
        m.post(ev.Unblock(3000 + pid, pid))
        m.settle()
    used = 0
    for pid in range(1, pids + 1):
        if (completion := m.deliveries[pid][-1].completion) is not None:
            used += completion.usage.prompt_tokens + completion.usage.completion_tokens + gifts[pid]
        if pid in gifts:
            return  # a fork after a gift has it too: only the bound is looked at
    left = quota - used
    if left >= 2:
        m.submit(500, "p" * (left - 1), tenant="t", sampling={"max_tokens": 2})
        m.submit(501, "p" * (left - 1), tenant="t", sampling={"max_tokens": 1})
        m.settle()
        assert m.end(500) == "Refused" and m.end(501) == "length"


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_an_answer_at_its_time_with_what_there_is(machine: type[Any]) -> None:
    m = machine()
    m.submit(1, deadline_s=20.0, sampling={"max_tokens": 500})
    submitted = m.now
    while m.now < submitted + 19:
        assert m.core.wakeup == submitted + 20
        m.complete()
    assert not any(item.completion for item in m.deliveries[1])
    m.now = m.core.wakeup - m.tick
    m.post()
    assert m.end(1) == "deadline" and m.core.wakeup is None
    assert 0 < len(m.tokens(1)) < 20 and m.tokens(1) == m.expected(1)[: len(m.tokens(1))]


@pytest.mark.parametrize("own", [True, False])
def test_a_queue_limit_refuses_who_has_not_run_by_its_time_and_nobody_else(machine: type[Any], own: bool) -> None:
    m = machine(batch_size=1, queue_s=None if own else 20.0)
    fields = {"queue_s": 20.0} if own else {}
    m.submit(1, sampling={"max_tokens": 60}, **fields)
    m.submit(2, **fields)
    submitted = m.now
    m.until(ev.Run)
    while m.now < submitted + 19:
        m.complete()
    assert 2 in m.core.processes
    m.now = submitted + 20 - m.tick
    m.post()
    assert m.end(2) == "Refused" and "has not run" in m.error(2)
    m.settle()
    assert m.end(1) == "length" and m.tokens(1) == m.expected(1)
