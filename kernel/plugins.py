"""The plugins of one kernel: which are on, what they registered, how they are asked. There is no global registry."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import pluggy
from msgspec import structs

from llm_os.kernel import hookspecs
from llm_os.kernel.compression import Pass
from llm_os.kernel.config import Config
from llm_os.kernel.constraint import Compiled
from llm_os.kernel.drafter import Drafter
from llm_os.kernel.driver import DeviceInfo, Driver, DriverFactory, DriverProbe
from llm_os.kernel.enabling import enable
from llm_os.kernel.errors import (
    ConfigError,
    DriverError,
    Error,
    ModelNotFound,
    PluginError,
    Refused,
    RequestError,
    Unsupported,
)
from llm_os.kernel.filters import Filter, TextFilter
from llm_os.kernel.grammar import Grammar
from llm_os.kernel.guarded import Filtering, GuardedDrafter, GuardedPolicy, lacks, opened
from llm_os.kernel.image import Image
from llm_os.kernel.isolation import Guard, Health, Lane, told
from llm_os.kernel.journal import Log
from llm_os.kernel.manifest import choose
from llm_os.kernel.policy import Fair, Policy, PolicyFactory
from llm_os.kernel.request import Request
from llm_os.kernel.residency import ModelInfo
from llm_os.kernel.swap import SwapStore
from llm_os.kernel.tool import Tool

T = TypeVar("T")

FILES_LIMIT_S = 60.0  # for importing a plugin, opening a model, applying a pass


class Plugins:
    """Raises ConfigError for a plugin that cannot be enabled, by its name."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.manifests = choose(config.plugins)
        if unknown := sorted(set(config.options) - {manifest.name for manifest in self.manifests}):
            raise ConfigError(f"options are for plugin {unknown[0]!r}, which is not enabled")
        self._manager = pluggy.PluginManager(hookspecs.hookspec.project_name)
        self._manager.add_hookspecs(hookspecs)
        self._lanes = {m.name: Lane(Health(m.name), config.hook_limit_s) for m in self.manifests}
        # Batches wait for masks: those have a thread of their own, so that they wait for no grammar to be compiled.
        self._masks = {name: Lane(lane.health, config.hook_limit_s) for name, lane in self._lanes.items()}
        self._guard = Guard(config.hook_limit_s)
        for manifest in self.manifests:
            enable(self._manager, manifest, FILES_LIMIT_S)
        self._drivers: dict[str, tuple[DriverFactory, DriverProbe]] = {}
        self._policies: dict[str, tuple[Lane, PolicyFactory]] = {}
        self._filters: dict[str, tuple[Lane, Filter]] = {}
        self._passes: dict[str, tuple[Lane, Pass]] = {}
        self._tools: dict[str, Tool] = {}
        self._drafters: dict[str, Drafter] = {}
        try:
            self._register()
        except BaseException:
            self.close()
            raise
        self._listeners = {
            hook: [
                (self._lanes[i.plugin_name], i.function, i.argnames)
                for i in getattr(self._manager.hook, hook).get_hookimpls()
            ]
            for hook in ("booted", "step_finished", "process_exited", "halting")
        }
        self.filtering = bool(self._filters) or self._wants("admit")  # requests go through plugins on their way
        self.watching = self.filtering or self._wants("step_finished") or self._wants("process_exited")

    # -- boot --------------------------------------------------------------------------------------------------------

    def _register(self) -> None:
        config = self._config
        self._boot("register_drivers", lambda lane: {"register": self._register_driver})
        for hook, register in (
            ("register_tools", self._register_tool),
            ("register_policies", self._register_policy),
            ("register_filters", self._register_filter),
            ("register_passes", self._register_pass),
            ("register_drafters", self._register_drafter),
        ):
            self._boot(hook, partial(_given, register, config))

    def _boot(self, hook: str, arguments: Callable[[Lane], dict[str, Any]]) -> None:
        """Let every plugin register, in the order in which they are enabled."""
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            lane = self._lanes[implementation.plugin_name]
            values = arguments(lane)
            try:
                lane.call(hook, NoneType, implementation.function, *(values[name] for name in implementation.argnames))
            except PluginError as error:
                name = implementation.plugin_name
                raise ConfigError(f"{error}; repair it, or llm-os plugins disable {name}") from error

    def _register_driver(self, name: str, factory: DriverFactory, probe: DriverProbe) -> None:
        if name in self._drivers or name == "auto":
            raise ConfigError(f"two plugins register a driver named {name!r}; disable one of them")
        self._drivers[name] = (factory, probe)

    def _register_tool(self, lane: Lane, tool: Tool) -> None:
        if not isinstance(tool, Tool):
            raise TypeError(f"register(tool) takes a Tool, not {type(tool).__name__}")
        if not (isinstance(tool.name, str) and re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", tool.name)):
            raise ValueError(f"a tool is named {tool.name!r:.80}; use 1 to 64 letters, digits, - or _")
        if not (isinstance(tool.parameters, dict) and isinstance(tool.description, str) and callable(tool.call)):
            raise TypeError(f"tool {tool.name!r} needs a description, a JSON schema and something to call")
        _keep(self._tools, "tool", tool.name, tool)

    def _register_policy(self, lane: Lane, name: str, factory: PolicyFactory) -> None:
        if not callable(factory):
            raise TypeError(f"register(name, factory) takes a function, not {type(factory).__name__}")
        _keep(self._policies, "policy", name, (lane, factory))

    def _register_filter(self, lane: Lane, name: str, filter: Filter) -> None:
        if (why := lacks(filter, Filter)) is not None:
            raise TypeError(f"register(name, filter) is given {why}")
        _keep(self._filters, "filter", name, (lane, filter))

    def _register_pass(self, lane: Lane, name: str, compression: Pass) -> None:
        if (why := lacks(compression, Pass)) is not None:
            raise TypeError(f"register(name, compression) is given {why}")
        _keep(self._passes, "pass", name, (lane, compression))

    def _register_drafter(self, lane: Lane, name: str, drafter: Drafter) -> None:
        if (why := lacks(drafter, Drafter)) is not None:
            raise TypeError(f"register(name, drafter) is given {why}")
        _keep(self._drafters, "drafter", name, GuardedDrafter(drafter, lane.health, self._guard))

    # -- what was registered -----------------------------------------------------------------------------------------

    @property
    def tools(self) -> tuple[Tool, ...]:
        return tuple(self._tools.values())

    @property
    def drafters(self) -> tuple[Drafter, ...]:
        """Guarded; the one that was enabled last is asked first."""
        return tuple(reversed(self._drafters.values()))

    def commands(self, config: Config) -> dict[str, tuple[Callable[..., Any], str]]:
        """What plugins add to `llm-os`: name -> (function, help). `config` is what the command line has."""
        commands: dict[str, tuple[Callable[..., Any], str]] = {}

        def register(name: str, command: Callable[..., Any], help: str) -> None:
            if name in commands:
                raise ConfigError(f"two plugins register a command named {name!r}; disable one of them")
            commands[name] = (command, help)

        self._boot("register_commands", lambda lane: {"register": register, "config": config})
        return commands

    def probe(self) -> list[DeviceInfo]:
        """Every registered driver's view of this machine."""
        return [_probe(name, probe) for name, (_, probe) in self._drivers.items()]

    def open_driver(self) -> Driver:
        """The driver that the configuration names. Raises ConfigError or DriverError."""
        name = self._config.driver
        if name == "auto":
            available = {info.driver for info in self.probe() if info.unavailable is None}
            name = "cuda" if "cuda" in available else "cpu"
        if name not in self._drivers:
            raise ConfigError(f"driver is {name!r}; registered are: auto, {', '.join(sorted(self._drivers))}")
        factory, _ = self._drivers[name]
        try:
            driver = factory(self._config)
        except Error:
            raise
        except Exception as error:
            raise DriverError(f"driver {name!r} cannot be made: {told(error)}") from error
        if (why := lacks(driver, Driver)) is not None:
            raise DriverError(f"the factory of driver {name!r} gave {why}")
        return driver

    def open_policy(self) -> Policy:
        """The policy that the configuration names, guarded: it falls back to Fair. Raises ConfigError."""
        name = self._config.policy
        if name not in self._policies:
            raise ConfigError(f"policy is {name!r}; registered are: {', '.join(sorted(self._policies))}")
        lane, factory = self._policies[name]
        try:
            policy = lane.call("register_policies", object, factory, self._config)
        except PluginError as error:
            raise ConfigError(f"policy {name!r} cannot be made: {error}") from error
        if (why := lacks(policy, Policy)) is not None:
            raise ConfigError(f"policy {name!r} cannot be made: plugin {lane.health.plugin!r} gave {why}")
        return policy if type(policy) is Fair else GuardedPolicy(policy, lane.health, self._guard)

    # -- choices -----------------------------------------------------------------------------------------------------

    def open_image(self, model: str) -> Image:
        """Raises ModelNotFound when no plugin knows the name, and what the plugin raises otherwise."""
        base, passes = model, list[str]()
        while (parts := base.rpartition("+"))[2] in self._passes:  # "+" may be part of a file's name
            base = parts[0]
            passes.insert(0, parts[2])
        try:
            asked = {"model": base, "config": self._config}
            image: Image | None = self._first("open_image", Image, asked, FILES_LIMIT_S)
        except ModelNotFound as error:
            if "+" not in base:
                raise
            known = ", ".join(self._passes) or "none, until a plugin such as quantize is enabled"
            raise ModelNotFound(f"{error}; or a pass, after the +: there is {known}") from error
        if image is None:
            raise ModelNotFound(f"no plugin knows a model named {base!r}; `llm-os models` lists what is here")
        for name in passes:
            image = self._apply(name, image)
        return image

    def _apply(self, name: str, image: Image) -> Image:
        lane, compression = self._passes[name]
        try:
            apply = partial(compression.apply, image)
            changed: Image | None = opened(lane.health, f"pass {name!r}", Image, apply, FILES_LIMIT_S)
        except BaseException:
            image.close()
            raise
        if changed is None:
            image.close()
            raise Unsupported(f"pass {name!r} of plugin {lane.health.plugin!r} gave no image")
        return changed

    def open_log(self, folder: Path) -> Log:
        """Raises StoreError, PluginError, and ConfigError when no plugin keeps a journal."""
        log: Log | None = self._first("open_log", Log, {"folder": folder}, None)
        if log is None:
            raise ConfigError(f"state is {str(folder)!r}, but no plugin keeps a journal")
        return log

    def open_swap(self, config: Config) -> SwapStore:
        """Raises StoreError, PluginError, and ConfigError when no plugin keeps swapped pages."""
        store: SwapStore | None = self._first("open_swap", SwapStore, {"config": config}, None)
        if store is None:
            raise ConfigError("swap_host or swap_disk is set, but no plugin keeps swapped pages")
        return store

    def _first(self, hook: str, kind: type, values: dict[str, Any], limit_s: float | None) -> Any:
        """The first thing that a plugin opens; who was enabled last is asked first, who is off is not asked."""
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            health = self._lanes[implementation.plugin_name].health
            if health.off is None:
                call = partial(implementation.function, *(values[name] for name in implementation.argnames))
                given = opened(health, hook, kind, call, limit_s)
                if given is not None:
                    return given
        return None

    def compile_grammar(self, grammar: Grammar, image: Image) -> Compiled:
        """Raises RequestError for a grammar that cannot be used, PluginError."""
        plugin, language = self._ask("compile_grammar", (object, NoneType), {"grammar": grammar, "image": image})
        if language is None:
            raise RequestError(f"no plugin compiles grammars of kind {grammar.kind!r}; enable one that does")
        return Compiled(language, partial(self._masks[plugin].start, "Matcher.allowed", bytes))

    def admit(self, request: Request) -> None:
        """Raises Refused if a plugin does, PluginError."""
        _, reason = self._ask("admit", (str, NoneType), {"request": request})
        if reason is not None:
            raise Refused(" ".join(reason.split()))

    def _ask(self, hook: str, kind: Any, values: dict[str, Any]) -> tuple[str, Any]:
        """The first answer that is not None, and whose it is; who was enabled last is asked first."""
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            lane = self._lanes[implementation.plugin_name]
            answer = lane.call(hook, kind, implementation.function, *(values[n] for n in implementation.argnames))
            if answer is not None:
                return lane.health.plugin, answer
        return "", None

    def pick_victim(self, victims: list[ModelInfo]) -> str | None:
        """In the kernel's thread. None if nobody chooses."""
        names = {info.name for info in victims}
        for implementation in reversed(self._manager.hook.pick_victim.get_hookimpls()):
            health = self._lanes[implementation.plugin_name].health
            arguments = [list(victims)] if implementation.argnames else []
            call = partial(_pick, implementation.function, arguments, names)
            name = self._guard.call(health, "pick_victim", call)
            if name is not None:
                return name
        return None

    # -- filters -----------------------------------------------------------------------------------------------------

    def open_filters(self, request: Request, submitted: bool = True) -> tuple[Request, list[TextFilter]]:
        """What the model shall see, and what the answer goes through, in order. Raises Refused where a plugin does not
        admit it, and PluginError: a request never passes by a filter that is broken. Those not `submitted`, but of a
        fork or an earlier life, have been admitted."""
        if submitted:
            self.admit(request)
        answer: list[TextFilter] = []
        for lane, filter in self._filters.values():
            pair = lane.call("Filter.open", (tuple, NoneType), filter.open, _copied(request))
            if pair is None:
                continue
            if len(pair) != 2 or not isinstance(pair[0], Request):
                raise lane.health.failed("Filter.open", "gave no (Request, TextFilter)")
            changed, text = pair
            try:
                request = Request(
                    **{
                        field: getattr(changed if field in ("messages", "prompt", "tools") else request, field)
                        for field in Request.__struct_fields__
                    }
                )
            except RequestError as error:
                raise lane.health.failed("Filter.open", f"gave a request that is none: {error}") from error
            if text is not None and (why := lacks(text, TextFilter)) is not None:
                raise lane.health.failed("Filter.open", f"gave {why}")
            if text is not None:
                answer.insert(0, Filtering(lane, text))
        return request, answer

    # -- events ------------------------------------------------------------------------------------------------------

    def tell(self, hook: str, **values: Any) -> None:
        """An event, to every plugin that wants it. Never waits, never raises."""
        for lane, function, names in self._listeners[hook]:
            lane.post(hook, function, *[values[name] for name in names], droppable=hook == "step_finished")

    def _wants(self, hook: str) -> bool:
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def close(self) -> None:
        """After the last event. Waits for what plugins still have to do, but no longer than two calls may take."""
        self._guard.close()
        until = time.monotonic() + 2 * self._config.hook_limit_s
        lanes = (*self._lanes.values(), *self._masks.values())
        for lane in lanes:
            lane.shut()
        for lane in lanes:
            lane.wait(until)


def _copied(request: Request) -> Request:
    """For a plugin, which may change it in place."""
    return structs.replace(request, messages=deepcopy(request.messages), tools=deepcopy(request.tools))


def _pick(function: Callable[..., Any], arguments: list[Any], names: set[str]) -> str | None:
    name = function(*arguments)
    if name is not None and not (type(name) is str and name in names):
        raise ValueError(f"{name!r:.80} is not one of the models that may go")
    return name


def _given(register: Callable[..., None], config: Config, lane: Lane) -> dict[str, Any]:
    return {"register": partial(register, lane), "config": config}


def _keep(registry: dict[str, T], what: str, name: str, value: T) -> None:
    if name in registry:
        raise ConfigError(f"two plugins register a {what} named {name!r}; disable one of them")
    registry[name] = value


def _probe(name: str, probe: DriverProbe) -> DeviceInfo:
    try:
        info = probe()
        if not isinstance(info, DeviceInfo):
            raise TypeError(f"it gave {type(info).__name__}, no DeviceInfo")
        return info
    except Exception as error:  # it promised not to; the other drivers still count
        why = f"its probe failed: {type(error).__name__}: {error}"
        return DeviceInfo(driver=name, device="", total_bytes=0, free_bytes=0, unavailable=why)
