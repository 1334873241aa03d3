"""Our own drivers keep the contract: the first users of the suite that every driver author has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from msgspec import structs

import llm_os
from llm_os.drivers.plugin import register_drivers
from llm_os.kernel.driver import DriverProbe
from llm_os.kernel.plugins import Plugins
from llm_os.testing import DriverConformance
from llm_os.testing.bench import GREEDY, PROMPT, Bench, decoded

PROBES: dict[str, DriverProbe] = {}
register_drivers(lambda name, factory, probe: PROBES.__setitem__(name, probe))


@pytest.mark.parametrize("driver", sorted(PROBES), scope="class")
class TestBuiltIn(DriverConformance):
    def make(self, config: llm_os.Config) -> llm_os.Driver:
        with closing(Plugins(config)) as plugins:
            return plugins.open_driver()

    @pytest.fixture(scope="class")
    @classmethod
    def bench(cls, driver: str, request: pytest.FixtureRequest) -> Iterator[Bench]:
        if why := PROBES[driver]().unavailable:
            pytest.skip(f"{driver}: {why}")
        if driver == "sim":
            model = "sim:conformance"
        else:
            path: Path = request.getfixturevalue("smollm2")
            model = str(path)
        cls.config = structs.replace(DriverConformance.config, driver=driver)
        with closing(llm_os.open_image(model)) as image, closing(cls().make(cls.config)) as opened:
            yield Bench(opened, cls.config, image, model)

    def test_all_guesses_are_checked_in_one_pass(self, bench: Bench) -> None:
        expected, pages = decoded(bench, [GREEDY] * 9)
        answer = [row.token for row in expected]
        (row,) = bench.run(bench.guess(PROMPT, pages, 0, [GREEDY] * 9, answer[:8]))
        assert isinstance(row, llm_os.Sampled) and [row.token, *(more.token for more in row.more)] == answer
