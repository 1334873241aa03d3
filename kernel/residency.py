"""Which models are where: on disk, near, on the way, on the device. Sizes and states only, no files, no tensors.

    OPENING ──> ON_DISK ──> LOADING ──> ON_DEVICE
                 │   ^ ^                    │
         prefetch│   │ └──── EVICTING <─────┘            KV stays when weights go, while anybody may want it
                 v   │
                IN_HOST (near: a load will be quick)

A request for a model that is not on the device is a *model fault*: room is made, the weights are loaded, while whoever
needs them waits and other models run. `Faults.serve` looks at each turn what is wanted and does the next step
towards it, so there is no plan that could be out of date.

Room is made by evicting cached KV; then idle models, in the order of GreedyDual-Size (Cao and Irani, USITS 1997:
inflation + uses * seconds to load / bytes, the least first); then models whose processes are all of a later class, or
of the same class and have had their slice; then KV of processes that do not run. A slice is `slice_s`, or ten times
what the change costs if that is longer: so at most a tenth of the time goes into changing (the hysteresis of
working-set schedulers against thrashing, Denning 1968).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from msgspec import Struct, structs

from llm_os.kernel import events as ev
from llm_os.kernel.config import Config, show_bytes
from llm_os.kernel.costs import Costs
from llm_os.kernel.driver import Footprint, Placement
from llm_os.kernel.errors import Refused, Unsupported
from llm_os.kernel.flights import Flights
from llm_os.kernel.image import Image
from llm_os.kernel.memory import Memory, MemoryInfo
from llm_os.kernel.slab import Slab, fit_page_tokens
from llm_os.kernel.swap import Swap

MAX_RESTING = 4  # images kept open after their model has left the device: some 10 MB each, of a large vocabulary more


class Where(StrEnum):
    """The states of a model."""

    OPENING = "opening"
    ON_DISK = "on disk"
    IN_HOST = "in host"
    LOADING = "loading"
    ON_DEVICE = "on device"
    EVICTING = "evicting"


AWAY = (Where.ON_DISK, Where.IN_HOST)
_THERE = (Where.ON_DEVICE, Where.LOADING, Where.EVICTING)  # with extents


class ModelInfo(Struct, frozen=True, kw_only=True):
    """One open model, as `kernel.models()` lists it. Bytes are what the ledger charges."""

    name: str
    architecture: str
    where: str
    weights: int
    workspace: int
    kv_bytes_per_token: int
    page_tokens: int
    pages: int
    context_length: int
    pinned: bool = False


PickVictim = Callable[[list[ModelInfo]], str | None]  # which of them is to leave the device; None abstains


@dataclass(eq=False)
class Model:
    """Mutable state of one open model, owned by the core."""

    name: str
    where: Where = Where.OPENING
    image: Image | None = None
    footprint: Footprint | None = None
    placement: Placement | None = None  # while it has extents
    slab: Slab | None = None
    kv_on_device: bool = False  # the driver has memory for its KV
    live: int = 0  # processes
    blocked: int = 0  # of these, those that wait for a tool
    pinned: bool = False
    stuck: bool = False  # the device failed to unload it: it stays where it is
    uses: int = 0
    rent: float = 0.0  # its place in the order of eviction
    loaded_at: float = 0.0
    progressed: bool = False  # it has generated a token since
    last_run: int = 0  # the operation that ran it last, for taking turns
    draining: bool = False  # no more batches: it is to leave as soon as none is in flight
    prefetch: bool = False  # bring it near when it has been opened
    far: bool = False  # that failed: no other try before it has been loaded or opened again
    load_tickets: list[int] = field(default_factory=list)
    unload_tickets: list[int] = field(default_factory=list)
    failure: Exception | None = None  # it could not be had: it is to be forgotten

    @property
    def leaving(self) -> bool:
        """It has been asked to go for good: who needs it waits until it has gone, and has it looked at again."""
        return bool(self.unload_tickets) or self.failure is not None

    @property
    def fixed(self) -> bool:
        """Nobody may take its place."""
        return self.pinned or self.stuck

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each extent: the weights, then the workspace."""
        assert self.footprint is not None
        return (*self.footprint.extents, self.footprint.workspace)

    @property
    def weights(self) -> int:
        return sum(self.footprint.extents) if self.footprint else 0

    def info(self, memory: Memory) -> ModelInfo:
        extents = self.placement.extents if self.placement else ()
        return ModelInfo(
            name=self.name,
            architecture=self.image.architecture if self.image else "",
            where=self.where.value,
            weights=sum(extent.frames for extent in extents[:-1]) * memory.frame_size,
            workspace=sum(extent.frames for extent in extents[-1:]) * memory.frame_size,
            kv_bytes_per_token=self.footprint.kv_bytes_per_token if self.footprint else 0,
            page_tokens=self.slab.page_tokens if self.slab else 0,
            pages=len(self.slab.pages) if self.slab else 0,
            context_length=self.image.context_length if self.image else 0,
            pinned=self.pinned,
        )


class Residency:
    """The models of one device, and their way onto it and off it."""

    def __init__(self, config: Config, memory: Memory, flights: Flights, costs: Costs, pick_victim: PickVictim) -> None:
        self._pick_victim = pick_victim
        self.models: dict[str, Model] = {}
        self.unreleased: set[str] = set()  # names of models whose KV memory the device failed to give back
        self._memory = memory
        self._flights = flights
        self._costs = costs
        self._page_tokens = config.page_tokens
        self._slice_s = config.slice_s
        self._inflation = 0.0

    # -- names and images --------------------------------------------------------------------------------------------

    def open(self, name: str) -> Model:
        """The model of that name; its image is on the way if nobody asked for it before."""
        model = self.models.get(name)
        if model is None:
            model = self.models[name] = Model(name)
        elif model.where not in AWAY or model.live or model.leaving or self._flights.concern(name):
            return model
        self.look_again(model)
        return model

    def look_again(self, model: Model) -> None:
        """Open its image; one that was left open, if its file has not changed."""
        model.where, model.far = Where.OPENING, False
        self._flights.start(ev.Open(self._flights.next_id(), model.name, model.image))

    def opened(self, model: Model, result: ev.Opened) -> bool:
        """The image is there. True if it is not the one that was there before: KV of that one is worth nothing.

        Raises Unsupported for a model that no page size suits."""
        before, model.image, model.footprint = model.image, result.image, result.footprint
        model.where = Where.ON_DISK
        if before is not None and before is not result.image:
            self._flights.emit(ev.Close(before))
        changed = before is not result.image
        if changed:
            tokens = self._fit(model.name, result.footprint)
            size = tokens * result.footprint.kv_bytes_per_token
            model.slab = Slab(self._memory, model.name, tokens, size)
        self._appraise(model)
        return changed

    def _fit(self, name: str, cost: Footprint) -> int:
        """Tokens of a page."""
        choices = cost.page_tokens if self._page_tokens is None else (self._page_tokens,)
        size = self._memory.frame_size
        tokens = fit_page_tokens(choices, cost.kv_bytes_per_token, size)
        if tokens is None or (self._page_tokens is not None and self._page_tokens not in cost.page_tokens):
            raise Unsupported(
                f"{name} keeps {cost.kv_bytes_per_token} bytes of KV per token: no page of "
                f"{self._page_tokens or min(cost.page_tokens)} tokens fits a frame of {size} bytes here; "
                "raise frame_size or change page_tokens"
            )
        return tokens

    def check_room(self, model: Model, prompt_tokens: int, answer_tokens: int) -> None:
        """Raises Refused for a request that could not get its pages if it and its model were alone, with what is
        pinned."""
        assert model.slab is not None
        memory = self._memory
        needed = model.slab.frames_for(prompt_tokens + answer_tokens) * memory.frame_size
        weights = self._frames(model) + sum(self._frames(m) for m in self.models.values() if m.fixed and m is not model)
        possible = max(0, memory.frames - weights) * memory.frame_size
        if needed > possible:
            raise Refused(
                f"{prompt_tokens} prompt tokens and {answer_tokens} more need {show_bytes(needed)} of KV; "
                f"{show_bytes(possible)} are left beside the weights; lower max_tokens, shorten the prompt, or "
                "raise memory"
            )

    def check_size(self, model: Model) -> None:
        """Raises Refused for a model that does not fit the budget beside what is pinned."""
        memory = self._memory
        needed = self._frames(model) + 1  # a frame of KV, at the least
        pinned = sum(self._frames(m) for m in self.models.values() if m.fixed and m is not model and m.placement)
        if needed > memory.frames - pinned:
            size = memory.frame_size
            free, total = show_bytes(memory.free_frames * size), show_bytes(memory.frames * size)
            evictable = show_bytes((memory.frames - memory.free_frames - pinned) * size)
            raise Refused(
                f"{model.name} needs {show_bytes(needed * size)} for weights, workspace and KV; {free} of the budget "
                f"of {total} are free and {evictable} could be freed; unpin a model or raise memory"
            )

    def _frames(self, model: Model) -> int:
        return sum(map(self._memory.frames_for, model.sizes)) if model.footprint else 0

    # -- onto the device ---------------------------------------------------------------------------------------------

    def frames_missing(self, model: Model) -> int:
        """Frames to be freed before its extents could be placed."""
        return self._frames(model) - self._memory.free_frames

    def place(self, model: Model, move_out: Callable[..., None] | None) -> bool:
        """Claim extents in free frames and load. Where the free frames are scattered, pages that lie between them move
        out of the way (`move_out`; None while a batch is in flight). False if it has to wait for that."""
        assert model.slab is not None and model.footprint is not None
        extents = self._memory.claim_extents(model.name, model.sizes)
        if extents is None:
            if move_out is None:
                return False
            claim = self._memory.claim_clearing(model.name, model.sizes)
            if claim is None:
                return False
            extents, pages = claim
            move_out(pages)
        slab = model.slab
        self._memory.open_slab(slab)
        pages_in_all = self._memory.frames * slab.slots
        model.placement = Placement(extents=extents, page_tokens=slab.page_tokens, pages=pages_in_all)
        model.where = Where.LOADING
        self.load_if_clear(model)
        return True

    def load_if_clear(self, model: Model) -> None:
        """Start the load, once no page is left in its extents."""
        if self._memory.clear(model.name) and model.placement is not None:
            assert model.image is not None
            load = ev.Load(self._flights.next_id(), model.name, model.image, model.placement)
            self._flights.start(load)

    def loaded(self, model: Model, seconds: float) -> None:
        model.where, model.loaded_at, model.kv_on_device = Where.ON_DEVICE, self._flights.now, True
        model.progressed = model.far = False
        self._costs.loaded(model.weights, seconds)
        self.touch(model)
        for ticket in model.load_tickets:
            self._flights.emit(ev.Reply(ticket))
        model.load_tickets.clear()

    def not_loaded(self, model: Model) -> None:
        """The load failed, or could not begin: the device is as it was."""
        self._memory.release_extents(model.name)
        model.placement, model.where = None, Where.ON_DISK
        if not model.kv_on_device and model.slab is not None:
            self._memory.close_slab(model.slab)

    def computed(self, name: str, tokens: int, sampled: bool, seconds: float) -> None:
        """A batch of so many tokens has run, and maybe one was generated."""
        model = self.models[name]
        model.progressed |= sampled
        self._costs.computed(model.weights, tokens, seconds)
        self._appraise(model)

    def _appraise(self, model: Model) -> None:
        """What a byte of its KV is worth, as far as is known now."""
        assert model.slab is not None and model.footprint is not None
        model.slab.worth = self._costs.compute_s(model.weights, 1) / model.footprint.kv_bytes_per_token

    def touch(self, model: Model) -> None:
        """It is used."""
        model.uses += 1
        worth = self._costs.load_s(model.weights) / max(1, model.weights)
        model.rent = self._inflation + model.uses * worth

    def fetch(self, model: Model) -> None:
        """Bring it near."""
        assert model.image is not None
        model.prefetch = False
        if model.where is Where.ON_DISK and not model.far and not self._flights.concern(model.name):
            self._flights.start(ev.Prefetch(self._flights.next_id(), model.name, model.image))

    # -- off the device ----------------------------------------------------------------------------------------------

    def idle(self) -> Model | None:
        """The model on the device that is missed the least: not pinned, and nobody runs or waits with it."""
        models = [m for m in self.models.values() if self._may_go(m) and m.live == m.blocked]
        models.sort(key=lambda m: (m.rent, m.last_run))
        if len(models) > 1 and (name := self._pick_victim([m.info(self._memory) for m in models])) is not None:
            return self.models[name]
        return models[0] if models else None

    def alone(self, model: Model, used: bool) -> bool:
        """Whether every other model that has weights on the device is there to stay, `used` or with no process."""
        others = [m for m in self.models.values() if m.placement and m is not model]
        return all(m.fixed and (used or not m.live) for m in others)

    def _may_go(self, model: Model) -> bool:
        return model.where is Where.ON_DEVICE and not model.fixed and not self._flights.busy(model.name)

    def slice_ends(self, model: Model, newcomer: Model) -> float:
        """When others of its class may take its place: not before it has generated a token, so that everybody gets on
        in the end, however slow the device."""
        if not model.progressed:
            return math.inf
        change = self._costs.load_s(model.weights) + self._costs.load_s(newcomer.weights)
        return model.loaded_at + max(self._slice_s, 10 * change)

    def evict(self, model: Model) -> None:
        """Start to take its weights off the device. No operation in flight names it."""
        self._inflation = max(self._inflation, model.rent)
        model.where, model.draining = Where.EVICTING, False
        self._flights.start(ev.Unload(self._flights.next_id(), model.name))

    def not_evicted(self, model: Model, error: Exception) -> None:
        """The device failed to unload it: its weights are where they were."""
        model.where, model.stuck = Where.ON_DEVICE, True
        for ticket in model.unload_tickets:
            self._flights.emit(ev.Reply(ticket, error))
        for ticket in model.load_tickets:
            self._flights.emit(ev.Reply(ticket))
        model.unload_tickets.clear()
        model.load_tickets.clear()

    def evicted(self, model: Model) -> None:
        """Its weights have gone."""
        self._memory.release_extents(model.name)
        model.placement, model.where = None, Where.ON_DISK

    def release_kv(self, model: Model) -> None:
        """Start to give back the memory of its KV, of which no page is left."""
        model.where = Where.EVICTING
        self._flights.start(ev.Release(self._flights.next_id(), model.name))

    def released(self, model: Model, error: bool) -> None:
        """The memory of its KV has been given back; or the device failed to, and has to be asked again before the model
        is loaded again: its pages may have another size by then."""
        if model.kv_on_device:
            self._memory.close_slab(self._memory.slabs[model.name])
        model.kv_on_device, model.where = False, Where.ON_DISK
        (self.unreleased.add if error else self.unreleased.discard)(model.name)

    def rest(self, model: Model) -> None:
        """Nobody uses it, and nothing of it is on the device. Its image stays open for the next time; of those, the
        least recent give way."""
        for ticket in model.unload_tickets:
            self._flights.emit(ev.Reply(ticket))
        model.unload_tickets.clear()
        resting = [m for m in self.models.values() if self.resting(m)]
        if len(resting) > MAX_RESTING:
            self.forget(min(resting, key=lambda m: (m.pinned, m.last_run)))

    def resting(self, model: Model) -> bool:
        """Whether only its image is open, and nobody wants more."""
        wanted = model.live or model.load_tickets or model.unload_tickets or self._flights.concern(model.name)
        return model.where in AWAY and not model.kv_on_device and not wanted

    def forget(self, model: Model) -> None:
        """Nothing of it is on the device, and nobody waits for it: close its file."""
        assert not model.live
        assert model.placement is None and not model.kv_on_device
        if model.image is not None:
            self._flights.emit(ev.Close(model.image))
        del self.models[model.name]

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def infos(self) -> list[ModelInfo]:
        return [model.info(self._memory) for model in self.models.values()]

    def memory_info(self, swap: Swap) -> MemoryInfo:
        scratch = [model.placement.extents[-1] for model in self.models.values() if model.placement]
        return structs.replace(self._memory.info(scratch), host=swap.used["host"], disk=swap.used["disk"])

    def check(self) -> None:
        slabs, on_device, loading = self._memory.slabs, Where.ON_DEVICE, Where.LOADING
        for name, model in self.models.items():
            where = model.where
            if model.placement is not None:
                assert where in _THERE, f"{name} is {where} and has extents"
            assert where is not on_device or (model.placement and model.kv_on_device)
            assert 0 <= model.blocked <= model.live
            assert (name in slabs) == (model.kv_on_device or where is loading)
