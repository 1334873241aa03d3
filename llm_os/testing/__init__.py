"""What authors of plugins and drivers test with. pytest and hypothesis are needed here, and nowhere else in llm-os.

    fixtures (with `addopts = ["-p", "llm_os.testing.plugin"]` in the settings of pytest)
        llm_os_kernel     makes kernels on the `sim` driver, closed at the end of the test
        llm_os_machine    makes the kernel's core with a virtual clock: `Machine`
    suites (a class of yours inherits from one of them, and says what is to be tested)
        DriverConformance, FormatConformance, PolicyConformance, FilterConformance, PassConformance, ToolConformance,
        DrafterConformance

Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_os.testing.drafters import DrafterConformance as DrafterConformance
    from llm_os.testing.drivers import DriverConformance as DriverConformance
    from llm_os.testing.filters import FilterConformance as FilterConformance
    from llm_os.testing.formats import FormatConformance as FormatConformance
    from llm_os.testing.machine import Machine as Machine
    from llm_os.testing.passes import PassConformance as PassConformance
    from llm_os.testing.policies import PolicyConformance as PolicyConformance
    from llm_os.testing.tools import ToolConformance as ToolConformance

_HOMES = {
    "DrafterConformance": "drafters",
    "DriverConformance": "drivers",
    "FilterConformance": "filters",
    "FormatConformance": "formats",
    "Machine": "machine",
    "PassConformance": "passes",
    "PolicyConformance": "policies",
    "ToolConformance": "tools",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llm_os.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llm_os.testing.{_HOMES[name]}"), name)
