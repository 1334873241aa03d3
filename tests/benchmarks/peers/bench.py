"""One run: its workers, what they answered, and what could not be measured. Knows no measure."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environments
from environments import OURS, Peer, Unavailable
from prompts import Prompts
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from worker import Answer, Failed, Worker


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    threads: int
    batches: tuple[int, ...] = (1, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (128, 1024)
    prefills: tuple[int, ...] = (128, 512, 2048)
    mixed_s: float = 12.0  # of arrivals in one probe
    mixed_probes: int = 4
    mixed_bound_s: float = 3.0  # the 95th percentile of latency must stay under it
    positions: int = 2560


@dataclass
class Results:
    """Samples, in order of rounds: measure -> engine -> values."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    unmeasured: list[tuple[str, str, str]] = field(default_factory=list)  # what, of whom, why
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, measure: str, unit: str, engine: str, value: float) -> None:
        self.units[measure] = unit
        self.samples.setdefault(measure, {}).setdefault(engine, []).append(value)

    def miss(self, measure: str, engine: str, why: str) -> None:
        if (measure, engine, why) not in self.unmeasured:
            self.unmeasured.append((measure, engine, why))

    def missed(self, measure: str, engine: str) -> bool:
        return any((measure, engine) == each[:2] for each in self.unmeasured)


class Bench:
    """Use as `with`: every process and file that it made is gone afterwards."""

    def __init__(self, plan: Plan, peers: list[Peer], model: Path, sha256: str, out: Path, console: Console) -> None:
        self.plan, self.out, self.console = plan, out, console
        self.results, self.prompts = Results(), Prompts(str(model))
        self.engines: list[Peer] = [OURS]
        self._model, self._sha256 = model, sha256
        self._files: dict[str, Path] = {}
        self._pythons: dict[str, Path] = {}
        self._live: dict[str, Worker] = {}
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
        )
        for peer in [OURS, *peers]:
            self._prepare(peer)

    def __enter__(self) -> Bench:
        self._kept = tempfile.TemporaryDirectory(prefix="llm-os-bench-")
        self.cache = Path(self._kept.name)  # what engines keep from one life to the next, empty at first
        self.out.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._live.values():
            worker.close()
        self._kept.cleanup()

    def _prepare(self, peer: Peer) -> None:
        what = "make the environment of" if not environments.is_ready(peer) else "look at"
        patience = "; this compiles for minutes, once" if peer.options and "make" in what else ""
        try:
            with self.doing(f"{what} {peer.name}{patience}"):
                self._pythons[peer.name] = environments.python_of(peer)
                self._files[peer.name] = environments.model_for(peer, self._model, self._sha256)
        except (Unavailable, OSError) as error:
            self.results.miss("everything", peer.name, str(error))
            return
        if peer is not OURS:
            self.engines.append(peer)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows what takes so long."""
        if not self.console.is_terminal:
            self.console.print(f"{time.strftime('%H:%M:%S')} {what}", highlight=False)
            yield
            return
        with self._progress:
            task = self._progress.add_task(what)
            try:
                yield
            finally:
                self._progress.remove_task(task)

    def turn(self, number: int) -> list[Peer]:
        """The engines, a different one first each round."""
        first = number % len(self.engines)
        return [*self.engines[first:], *self.engines[:first]]

    def file_of(self, peer: Peer) -> Path:
        return self._files.get(peer.name, self._model)

    def start(self, peer: Peer, cache: Path | None = None) -> Worker:
        """A fresh worker, nothing loaded. Raises Failed."""
        python = self._pythons.get(peer.name) or environments.python_of(peer)
        worker = Worker(peer, python, self.plan.threads, self.out / f"{peer.name}.log", cache or self.cache)
        self.results.versions[peer.name] = worker.version
        return worker

    def load(self, worker: Worker, sequences: int, context: int) -> Answer:
        """Raises Failed."""
        model = str(self.file_of(worker.peer))
        return worker.ask("load", model=model, threads=self.plan.threads, sequences=sequences, context=context)

    def ask(self, peer: Peer, measure: str, do: str, **arguments: Any) -> Any:
        """What the peer's long-lived worker answers; None, and noted, where it cannot. It is not asked twice what it
        failed at."""
        if self.results.missed(measure, peer.name):
            return None
        try:
            worker = self._live.get(peer.name)
            if worker is None or not worker.alive:
                worker = self._live[peer.name] = self.start(peer)
                self.load(worker, max(self.plan.batches), max(self.plan.contexts))
            return worker.ask(do, **arguments).value
        except Failed as error:
            self.results.miss(measure, peer.name, str(error))
            return None

    def rest(self, peer: Peer) -> None:
        """End the peer's long-lived worker, if there is one."""
        if worker := self._live.pop(peer.name, None):
            worker.close()
