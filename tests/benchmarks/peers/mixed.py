"""A mixed load: for each engine, the highest rate of arrivals at which the 95th percentile of latency stays in bounds.

Rates are searched by bisection, on a logarithmic scale, around what the engine does when all come at once. The engines
take turns, probe by probe. A variant of another peer is left out: this takes long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from bench import Bench
from environments import Peer

MEASURE = "mixed load"
_BURST = 24  # requests that come at once, to see what an engine can do
_LOW, _HIGH = 0.25, 1.4  # times that, the ends of the search
_FOREVER_S = 1e6


@dataclass
class Search:
    low: float
    high: float
    best: dict[str, Any] | None = None
    probes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return math.sqrt(self.low * self.high)

    def add(self, probe: dict[str, Any]) -> None:
        self.probes.append(probe)
        if probe["in_time"]:
            self.low, self.best = probe["rate"], probe
        else:
            self.high = probe["rate"]


def mixed(bench: Bench) -> None:
    searches = {peer.name: None if peer.beside else _begin(bench, peer) for peer in bench.engines}
    for number in range(bench.plan.mixed_probes):
        for peer in bench.turn(number):
            if (search := searches[peer.name]) is not None:
                with bench.doing(f"{MEASURE}, {search.rate:.2f} requests a second, {peer.name}"):
                    probe = _probe(bench, peer, search.rate)
                if probe is not None:
                    search.add(probe)
    for name, search in searches.items():
        if search is None:
            continue
        bench.results.details.setdefault(MEASURE, {})[name] = search.probes
        if search.best is not None:
            bench.results.add(MEASURE, "tokens/s", name, search.best["tokens_s"])
            bench.results.add("mixed load, requests", "1/s", name, search.best["rate"])
        elif search.probes:
            bound = f"{bench.plan.mixed_bound_s:g} s"
            slowest = min(probe["rate"] for probe in search.probes)
            bench.results.miss(MEASURE, name, f"at {slowest:.2f} requests a second p95 latency was over {bound} still")


def _begin(bench: Bench, peer: Peer) -> Search | None:
    wishes = bench.prompts.wishes(math.inf, _BURST, seed=1)
    with bench.doing(f"{MEASURE}, {_BURST} requests at once, {peer.name}"):
        played = bench.ask(peer, MEASURE, "traffic", wishes=wishes, bound=_FOREVER_S)
    if played is None:
        return None
    most = _BURST / played["seconds"]
    return Search(_LOW * most, _HIGH * most)


def _probe(bench: Bench, peer: Peer, rate: float) -> dict[str, Any] | None:
    bound = bench.plan.mixed_bound_s
    wishes = bench.prompts.wishes(rate, bench.plan.mixed_s, seed=2)
    played = bench.ask(peer, MEASURE, "traffic", wishes=wishes, bound=bound)
    if played is None:
        return None
    latencies = sorted(played["latencies"])
    p95 = latencies[math.ceil(0.95 * len(latencies)) - 1] if played["whole"] else math.inf
    return {
        "rate": rate,
        "in_time": p95 <= bound,
        "p95_s": p95 if p95 < math.inf else None,  # None: stopped, for too many were late
        "tokens_s": played["tokens"] / played["seconds"],
        "requests": len(wishes),
    }
