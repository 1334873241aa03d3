"""The pytest plugin (entry point `llm_os` of pytest11): fixtures. Imports nothing of llm-os until one is used."""

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
