"""The doors of the kernel: what a plugin may implement. Entry-point group `llm_os`, contract version `CONTRACT`.

A plugin is a module, or a class of which each kernel makes an object, with functions named as below and marked with
`llm_os.hookimpl`; a function may leave out arguments that it does not need. Built-ins come in through the same doors.

    registrations   register_*    objects, given once at boot and composed by the kernel
    choices         open_*, compile_grammar, admit, pick_victim    the first answer that is not None counts
    events          booted, step_finished, process_exited, halting    return nothing

Every hook says since which contract version it is there. A change that only adds leaves CONTRACT as it is; one that
breaks plugins raises it (`tests/contract.py`), and what it replaces stays for that one version, in DEPRECATED.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pluggy
from msgspec import Struct

from llm_os.kernel.compression import Pass
from llm_os.kernel.config import Config
from llm_os.kernel.drafter import Drafter
from llm_os.kernel.driver import DeviceInfo, DriverFactory, DriverProbe
from llm_os.kernel.filters import Filter
from llm_os.kernel.grammar import Grammar, Language
from llm_os.kernel.image import Image
from llm_os.kernel.journal import Log
from llm_os.kernel.policy import PolicyFactory
from llm_os.kernel.request import FinishReason, Request, Usage
from llm_os.kernel.residency import ModelInfo
from llm_os.kernel.swap import SwapStore
from llm_os.kernel.tool import Tool

CONTRACT = 1
DEPRECATED: dict[str, str] = {}  # "hook" or "hook.argument", which still works in this version -> what to use instead

hookspec = pluggy.HookspecMarker("llm_os")
hookimpl = pluggy.HookimplMarker("llm_os")


class StepInfo(Struct, frozen=True, kw_only=True):
    """One batch that has come back."""

    model: str
    sequences: int
    tokens: int  # that were fed
    seconds: float  # from its start to its end
    live: int  # processes in the kernel
    drafted: int = 0  # guesses that were fed (of `tokens`), and of these
    accepted: int = 0  # those that were right: so many tokens of answers came beside the one of each sequence


class ExitInfo(Struct, frozen=True, kw_only=True):
    """A process that has ended: with a reason, or with an error."""

    pid: int
    tenant: str
    model: str
    finish_reason: FinishReason | None
    error: str | None
    usage: Usage | None


class RegisterDriver(Protocol):
    def __call__(self, name: str, factory: DriverFactory, probe: DriverProbe) -> None: ...


class RegisterPolicy(Protocol):
    def __call__(self, name: str, factory: PolicyFactory) -> None: ...


class RegisterFilter(Protocol):
    def __call__(self, name: str, filter: Filter) -> None: ...


class RegisterPass(Protocol):
    def __call__(self, name: str, compression: Pass) -> None: ...


class RegisterTool(Protocol):
    def __call__(self, tool: Tool) -> None: ...


class RegisterDrafter(Protocol):
    def __call__(self, name: str, drafter: Drafter) -> None: ...


class RegisterCommand(Protocol):
    def __call__(self, name: str, command: Callable[..., Any], help: str) -> None: ...


# -- registrations -----------------------------------------------------------------------------------------------------


@hookspec
def register_drivers(register: RegisterDriver) -> None:
    """Offer devices: call `register(name, factory, probe)` for each.

    Called once per kernel, at boot, in the plugin's own thread. `factory` is called by the thread that builds the
    kernel, if `Config.driver` names it; `probe` by `llm-os doctor` and by the choice of "auto". Neither may be slow to
    import: import inside. Since 1.
    """


@hookspec
def register_policies(register: RegisterPolicy) -> None:
    """Offer scheduling policies: call `register(name, factory)` for each.

    Called once per kernel, at boot, in the plugin's own thread. `factory(config)` is called only if `Config.policy`
    names it. The contract is `Policy` in `kernel/policy.py`. Since 1.
    """


@hookspec
def register_filters(register: RegisterFilter, config: Config) -> None:
    """Put filters between requests and models, and between answers and readers: call `register(name, filter)` for each.

    Called once per kernel, at boot, in the plugin's own thread. Requests go through the filters in the order in
    which their plugins are enabled, answers in the opposite one. The contract is `Filter` in `kernel/filters.py`. Since
    1.
    """


@hookspec
def register_passes(register: RegisterPass, config: Config) -> None:
    """Offer compression passes: call `register(name, compression)` for each.

    Called once per kernel, at boot, in the plugin's own thread. A pass is applied to a model that is asked for as
    "MODEL+NAME". The contract is `Pass` in `kernel/compression.py`. Since 1.
    """


@hookspec
def register_tools(register: RegisterTool, config: Config) -> None:
    """Offer tools: call `register(tool)` for each.

    Called once per kernel, at boot, in the plugin's own thread. `Kernel.tools` lists them; nothing runs them but
    who asks for it. The contract is `Tool` in `kernel/tool.py`. Since 1.
    """


@hookspec
def register_drafters(register: RegisterDrafter, config: Config) -> None:
    """Guess what comes next, so that one step may bring several tokens: call `register(name, drafter)` for each.

    Called once per kernel, at boot, in the plugin's own thread. For each process the drafter of the plugin that was
    enabled last is asked first; the first guesses count. The contract is `Drafter` in `kernel/drafter.py`. Since 1.
    """


@hookspec
def register_commands(register: RegisterCommand, config: Config) -> None:
    """Add commands to `llm-os`: call `register(name, command, help)` for each.

    Called once per run of `llm-os`, at its start, so import inside. `command` is a function whose parameters have type
    hints; it returns the exit code, or None for 0. Since 1.
    """


# -- choices -----------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def open_image(model: str, config: Config) -> Image | None:
    """Open the model of that name, or None if the name is not for this plugin.

    Called once per model and load, from a worker thread, so it may read files. Raises ModelNotFound, FormatError or
    Unsupported. The first result wins; third-party plugins are asked before built-ins. Since 1.
    """


@hookspec(firstresult=True)
def open_log(folder: Path) -> Log | None:
    """Open the journal of a state directory, with the sessions that had not ended.

    Called once per kernel that has `Config.state`, at boot, from the thread that builds it. Raises StoreError. The
    first result wins; third-party plugins are asked before built-ins. Since 1.
    """


@hookspec(firstresult=True)
def open_swap(config: Config) -> SwapStore | None:
    """Open the place for KV that leaves the device.

    Called once per kernel that has `Config.swap_host` or `swap_disk`, at boot, from the thread that builds it. Raises
    StoreError. The first result wins; third-party plugins are asked before built-ins. Since 1.
    """


@hookspec(firstresult=True)
def compile_grammar(grammar: Grammar, image: Image) -> Language | None:
    """Compile what an answer must match, for this model's vocabulary, or None if the kind is not for this plugin.

    Called once per process that has `Sampling.grammar`, in the plugin's own thread; again for one that is restored,
    never for a fork, which shares its parent's. Matchers are called in another thread of the plugin's, for which
    batches wait. Raises RequestError for a grammar that is wrong or too large. The first result wins; third-party
    plugins are asked before built-ins. Since 1.
    """


@hookspec(firstresult=True)
def admit(request: Request) -> str | None:
    """Refuse a request: return why, in one line; None abstains.

    Called once per request before its text is encoded, in the plugin's own thread. The caller gets Refused with the
    text. Since 1.
    """


@hookspec(firstresult=True)
def pick_victim(victims: list[ModelInfo]) -> str | None:
    """Choose the model whose weights leave the device for another's, by name; None abstains.

    Called in the kernel's thread when a model fault needs room, with the models that may go, in the order in which the
    kernel would choose. A pure function, quick, without any lock, file or socket. A name that is not among them is a
    failure of the plugin. Since 1.
    """


# -- events ------------------------------------------------------------------------------------------------------------


@hookspec
def booted(config: Config, device: DeviceInfo) -> None:
    """The kernel is ready. Called once, in the plugin's own thread, before its other events. Since 1."""


@hookspec
def step_finished(step: StepInfo) -> None:
    """A batch has come back. Called once per batch, in the plugin's own thread, in order, a moment later.

    A plugin that is slower than the kernel misses some: at most 1,024 wait for it. Since 1.
    """


@hookspec
def process_exited(process: ExitInfo) -> None:
    """A process has ended, as the kernel saw it: a filter that fails afterwards tells its reader something else. Called
    once per process, in the plugin's own thread, in order, a moment later. Since 1."""


@hookspec
def halting() -> None:
    """The kernel closes: nothing runs any more. Called once, in the plugin's own thread, after its other events; the
    kernel waits for it, but no longer than `Config.hook_limit_s`. Since 1."""


HOOKS = frozenset(name for name, function in list(globals().items()) if hasattr(function, "llm_os_spec"))
