"""llm-os: an operating-system kernel for language models. This is the front door; see docs/life-of-a-request.md.

Names are imported on first use, so that `import llm_os` costs nothing that is not needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_os.api import commands as commands
    from llm_os.api import enabled_plugins as enabled_plugins
    from llm_os.api import generate as generate
    from llm_os.api import installed_plugins as installed_plugins
    from llm_os.api import open_image as open_image
    from llm_os.api import probe as probe
    from llm_os.drivers.formats.changed import change_weights as change_weights
    from llm_os.drivers.formats.changed import weight_matrices as weight_matrices
    from llm_os.drivers.formats.weights import WeightTensor as WeightTensor
    from llm_os.drivers.simulation import Report as Report
    from llm_os.drivers.simulation import replay as replay
    from llm_os.drivers.simulation import simulate as simulate
    from llm_os.drivers.store import Progress as Progress
    from llm_os.drivers.store import Store as Store
    from llm_os.drivers.store import StoredModel as StoredModel
    from llm_os.kernel.compression import Pass as Pass
    from llm_os.kernel.config import Config as Config
    from llm_os.kernel.config import Tenant as Tenant
    from llm_os.kernel.drafter import Draft as Draft
    from llm_os.kernel.drafter import DraftContext as DraftContext
    from llm_os.kernel.drafter import Drafter as Drafter
    from llm_os.kernel.driver import Batch as Batch
    from llm_os.kernel.driver import DeviceInfo as DeviceInfo
    from llm_os.kernel.driver import DeviceMemory as DeviceMemory
    from llm_os.kernel.driver import Driver as Driver
    from llm_os.kernel.driver import Extent as Extent
    from llm_os.kernel.driver import Footprint as Footprint
    from llm_os.kernel.driver import Guess as Guess
    from llm_os.kernel.driver import Move as Move
    from llm_os.kernel.driver import Placement as Placement
    from llm_os.kernel.driver import RowError as RowError
    from llm_os.kernel.driver import Sample as Sample
    from llm_os.kernel.driver import Sampled as Sampled
    from llm_os.kernel.driver import Sequence as Sequence
    from llm_os.kernel.errors import Closed as Closed
    from llm_os.kernel.errors import ConfigError as ConfigError
    from llm_os.kernel.errors import DriverError as DriverError
    from llm_os.kernel.errors import Error as Error
    from llm_os.kernel.errors import FormatError as FormatError
    from llm_os.kernel.errors import ModelError as ModelError
    from llm_os.kernel.errors import ModelNotFound as ModelNotFound
    from llm_os.kernel.errors import PluginError as PluginError
    from llm_os.kernel.errors import Refused as Refused
    from llm_os.kernel.errors import RequestError as RequestError
    from llm_os.kernel.errors import StoreError as StoreError
    from llm_os.kernel.errors import Unsupported as Unsupported
    from llm_os.kernel.filters import Filter as Filter
    from llm_os.kernel.filters import TextFilter as TextFilter
    from llm_os.kernel.grammar import Grammar as Grammar
    from llm_os.kernel.grammar import Language as Language
    from llm_os.kernel.grammar import Matcher as Matcher
    from llm_os.kernel.hookspecs import CONTRACT as CONTRACT
    from llm_os.kernel.hookspecs import ExitInfo as ExitInfo
    from llm_os.kernel.hookspecs import RegisterCommand as RegisterCommand
    from llm_os.kernel.hookspecs import RegisterDrafter as RegisterDrafter
    from llm_os.kernel.hookspecs import RegisterDriver as RegisterDriver
    from llm_os.kernel.hookspecs import RegisterFilter as RegisterFilter
    from llm_os.kernel.hookspecs import RegisterPass as RegisterPass
    from llm_os.kernel.hookspecs import RegisterPolicy as RegisterPolicy
    from llm_os.kernel.hookspecs import RegisterTool as RegisterTool
    from llm_os.kernel.hookspecs import StepInfo as StepInfo
    from llm_os.kernel.hookspecs import hookimpl as hookimpl
    from llm_os.kernel.image import Image as Image
    from llm_os.kernel.image import TextDecoder as TextDecoder
    from llm_os.kernel.journal import Log as Log
    from llm_os.kernel.kernel import Kernel as Kernel
    from llm_os.kernel.manifest import Manifest as Manifest
    from llm_os.kernel.memory import MemoryInfo as MemoryInfo
    from llm_os.kernel.policy import Candidate as Candidate
    from llm_os.kernel.policy import Fair as Fair
    from llm_os.kernel.policy import Policy as Policy
    from llm_os.kernel.policy import Share as Share
    from llm_os.kernel.process import ProcessInfo as ProcessInfo
    from llm_os.kernel.request import Chunk as Chunk
    from llm_os.kernel.request import Completion as Completion
    from llm_os.kernel.request import Request as Request
    from llm_os.kernel.request import Sampling as Sampling
    from llm_os.kernel.request import SamplingDefaults as SamplingDefaults
    from llm_os.kernel.request import Timings as Timings
    from llm_os.kernel.request import TokenLogprob as TokenLogprob
    from llm_os.kernel.request import Usage as Usage
    from llm_os.kernel.residency import ModelInfo as ModelInfo
    from llm_os.kernel.stream import Stream as Stream
    from llm_os.kernel.swap import SwapStore as SwapStore
    from llm_os.kernel.tool import Tool as Tool
    from llm_os.scoring import Scores as Scores
    from llm_os.scoring import score as score

_HOMES = {
    "kernel.compression": ("Pass",),
    "kernel.filters": (
        "Filter",
        "TextFilter",
    ),
    "kernel.grammar": (
        "Grammar",
        "Language",
        "Matcher",
    ),
    "kernel.manifest": ("Manifest",),
    "kernel.policy": (
        "Candidate",
        "Fair",
        "Policy",
        "Share",
    ),
    "kernel.tool": ("Tool",),
    "api": (
        "commands",
        "enabled_plugins",
        "installed_plugins",
        "generate",
        "open_image",
        "probe",
    ),
    "drivers.formats.changed": (
        "change_weights",
        "weight_matrices",
    ),
    "drivers.formats.weights": ("WeightTensor",),
    "drivers.simulation": (
        "Report",
        "replay",
        "simulate",
    ),
    "drivers.store": (
        "Progress",
        "Store",
        "StoredModel",
    ),
    "kernel.config": (
        "Config",
        "Tenant",
    ),
    "kernel.drafter": (
        "Draft",
        "DraftContext",
        "Drafter",
    ),
    "kernel.driver": (
        "Batch",
        "DeviceInfo",
        "DeviceMemory",
        "Driver",
        "Extent",
        "Footprint",
        "Guess",
        "Move",
        "Placement",
        "RowError",
        "Sample",
        "Sampled",
        "Sequence",
    ),
    "kernel.errors": (
        "Closed",
        "ConfigError",
        "DriverError",
        "Error",
        "FormatError",
        "ModelError",
        "ModelNotFound",
        "PluginError",
        "Refused",
        "RequestError",
        "StoreError",
        "Unsupported",
    ),
    "kernel.hookspecs": (
        "CONTRACT",
        "ExitInfo",
        "RegisterCommand",
        "RegisterDrafter",
        "RegisterDriver",
        "RegisterFilter",
        "RegisterPass",
        "RegisterPolicy",
        "RegisterTool",
        "StepInfo",
        "hookimpl",
    ),
    "kernel.image": (
        "Image",
        "TextDecoder",
    ),
    "kernel.journal": ("Log",),
    "kernel.kernel": ("Kernel",),
    "kernel.memory": ("MemoryInfo",),
    "kernel.process": ("ProcessInfo",),
    "kernel.request": (
        "Chunk",
        "Completion",
        "Request",
        "Sampling",
        "SamplingDefaults",
        "Timings",
        "TokenLogprob",
        "Usage",
    ),
    "kernel.residency": ("ModelInfo",),
    "kernel.stream": ("Stream",),
    "kernel.swap": ("SwapStore",),
    "scoring": (
        "Scores",
        "score",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'llm_os' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"llm_os.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
