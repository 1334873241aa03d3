"""The pytest plugin: fixtures. Imports nothing of llm-os until one is used.

Named by who wants it, `-p llm_os.testing.plugin`, and no entry point: pytest would rewrite the asserts of all of llm-os
then, in every run where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from llm_os import Kernel
    from llm_os.testing import Machine

pytest.register_assert_rewrite(
    *(f"llm_os.testing.{name}" for name in ("drivers", "filters", "formats", "machine", "passes", "policies", "tools"))
)


@pytest.fixture
def llm_os_kernel() -> Iterator[Callable[..., Kernel]]:
    """`llm_os_kernel(plugins=("mine",))`: a kernel with 64 MiB on the `sim` driver, unless given fields of Config say
    otherwise. Models are called "sim:anything". All are closed at the end of the test."""
    from llm_os import Config, Kernel

    with ExitStack() as opened:

        def boot(**config: Any) -> Kernel:
            return opened.enter_context(Kernel(Config(**{"driver": "sim", "memory": "64MiB", **config})))

        yield boot


@pytest.fixture
def llm_os_machine() -> type[Machine]:
    """`llm_os_machine(policy="mine", plugins=("mine",))`: the kernel's core in virtual time."""
    from llm_os.testing import Machine

    return Machine
