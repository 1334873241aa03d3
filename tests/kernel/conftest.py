"""The core on the sim driver, with time and completions in the test's hands; plugins as an installer puts them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import pytest

import llm_os
from llm_os.drivers.sim import Lone, SimImage
from llm_os.kernel.process import salt_of
from llm_os.kernel.random import uniform
from llm_os.testing import Machine


@pytest.fixture
def machine() -> type[Machine]:
    return Machine


class Oracle:
    """Guesses what a lone process of its machine would answer, but for what `spoil(position, token)` makes of it."""

    def __init__(self, spoil: Callable[[int, int], int]) -> None:
        self.machine: Machine | None = None
        self.spoil = spoil
        self.asked: list[int] = []  # limits

    def open(self, context: llm_os.DraftContext) -> OracleDraft:
        assert self.machine is not None
        request, seed = self.machine.requests[context.pid]
        lone = Lone(SimImage.parse(request.model), salt_of(request.tenant))
        return OracleDraft(self, lone, seed, request.sampling.temperature or 0.0)


class OracleDraft:
    def __init__(self, oracle: Oracle, lone: Lone, seed: int, temperature: float) -> None:
        self._oracle, self._lone, self._seed, self._temperature = oracle, lone, seed, temperature

    def guess(self, new: Sequence[int], limit: int) -> Sequence[int]:
        self._oracle.asked.append(limit)
        for token in new:
            self._lone.feed(token)
        lone, found = copy(self._lone), list[int]()
        for _ in range(limit):
            sample = llm_os.Sample(uniform=uniform(self._seed, lone.fed), temperature=self._temperature)
            found.append(self._oracle.spoil(lone.fed, lone.next(sample)))
            lone.feed(found[-1])
        return found


@pytest.fixture
def speculating() -> Callable[..., Machine]:
    """Makes a machine with an oracle: `speculating(page_tokens=4)`, `speculating(lambda position, token: 97)`. It is
    right about everything unless it is spoilt; `machine.oracle.asked` has the limits that it was given."""

    def make(spoil: Callable[[int, int], int] = lambda position, token: token, **config: Any) -> Machine:
        oracle = Oracle(spoil)
        machine = Machine(drafters=[oracle], **{"speculation": "always", "draft_tokens": 4, **config})
        oracle.machine = machine
        machine.oracle = oracle  # type: ignore[attr-defined]
        return machine

    return make


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a distribution with one plugin, a package with its manifest, on the path, as an installer would."""

    def install(name: str, source: str, *hooks: str, manifest: str | None = None) -> None:
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text(source)
        table = f'[{name}]\nsummary = "for a test"\ncontract = {llm_os.CONTRACT}\nhooks = {list(hooks)}\n'
        (package / "llm_os.toml").write_text(table if manifest is None else manifest)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[llm_os]\n{name} = {name}\n")
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    return install
