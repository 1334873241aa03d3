"""Which models are where: on disk, on the way, on the device. Sizes and states only, no files, no tensors.

A request for a model that is not on the device is a model fault: the image is opened, memory is claimed, the weights
are loaded, while whoever needs them waits. Knows nothing of processes: the core tells them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from msgspec import Struct

from llm_os.kernel import events as ev
from llm_os.kernel.config import show_bytes
from llm_os.kernel.driver import Footprint, Placement
from llm_os.kernel.errors import Refused, Unsupported
from llm_os.kernel.flights import Flights
from llm_os.kernel.image import Image
from llm_os.kernel.memory import Memory, MemoryInfo, Slab, fit_page_tokens

MAX_RESTING = 4  # images kept open after their model has left the device: some 10 MB each, of a large vocabulary more


class Where(StrEnum):
    """OPENING -> ON_DISK -> LOADING -> ON_DEVICE -> EVICTING -> ON_DISK."""

    OPENING = "opening"
    ON_DISK = "on disk"
    LOADING = "loading"
    ON_DEVICE = "on device"
    EVICTING = "evicting"


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


@dataclass(eq=False)
class Model:
    """Mutable state of one open model, owned by the core."""

    name: str
    where: Where = Where.OPENING
    image: Image | None = None
    footprint: Footprint | None = None
    placement: Placement | None = None
    slab: Slab | None = None
    load_tickets: list[int] = field(default_factory=list)
    unload_tickets: list[int] = field(default_factory=list)
    used: bool = False  # since it was opened or looked at again
    last_run: int = 0  # the operation that ran it last, for taking turns

    @property
    def leaving(self) -> bool:
        """It has been asked to go: who needs it waits until it has gone, and has it opened again."""
        return self.where is Where.EVICTING or bool(self.unload_tickets)

    def place(self, memory: Memory, page_tokens: int | None) -> Placement:
        """Claim memory for weights and workspace and cut pages. Raises Refused or Unsupported, claiming nothing."""
        assert self.footprint is not None
        cost = self.footprint
        choices = cost.page_tokens if page_tokens is None else (page_tokens,)
        tokens = fit_page_tokens(choices, cost.kv_bytes_per_token, memory.frame_size)
        if tokens is None or (page_tokens is not None and page_tokens not in cost.page_tokens):
            raise Unsupported(
                f"{self.name} keeps {cost.kv_bytes_per_token} bytes of KV per token: no page of "
                f"{page_tokens or min(cost.page_tokens)} tokens fits a frame of {memory.frame_size} bytes here; "
                "raise frame_size or change page_tokens"
            )
        page_bytes = tokens * cost.kv_bytes_per_token
        extents = memory.claim_extents(self.name, (*cost.extents, cost.workspace))
        if not memory.free_frames and not memory.slabs:
            memory.release_extents(self.name)
            raise Refused(
                f"{self.name} leaves no memory for KV; raise memory above {memory.frames * memory.frame_size}"
            )
        self.slab = memory.open_slab(self.name, tokens, page_bytes)
        self.placement = Placement(extents=extents, page_tokens=tokens, pages=memory.frames * self.slab.slots)
        return self.placement

    def displace(self, memory: Memory) -> None:
        """Give back what `place` claimed."""
        if self.placement is not None:
            memory.close_slab(self.name)
            memory.release_extents(self.name)
        self.slab = self.placement = None

    def check_room(self, memory: Memory, prompt_tokens: int, answer_tokens: int) -> None:
        """Raises Refused for a request that could not get its pages if it were alone."""
        assert self.slab is not None
        needed = self.slab.frames_for(prompt_tokens + answer_tokens) * memory.frame_size
        possible = (memory.frames - memory.extent_frames) * memory.frame_size
        if needed > possible:
            raise Refused(
                f"{prompt_tokens} prompt tokens and {answer_tokens} more need {show_bytes(needed)} of KV; "
                f"{show_bytes(possible)} are left beside the weights; lower max_tokens, shorten the prompt, or "
                "raise memory"
            )

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
            pages=len(self.slab.references) if self.slab else 0,
            context_length=self.image.context_length if self.image else 0,
        )


class Residency:
    """The models of one device, and their way onto it and off it."""

    def __init__(self, memory: Memory, flights: Flights, page_tokens: int | None) -> None:
        self.models: dict[str, Model] = {}
        self._memory = memory
        self._flights = flights
        self._page_tokens = page_tokens

    def open(self, name: str) -> Model:
        """The model of that name; its image is on the way if nobody asked for it before."""
        model = self.models.get(name)
        if model is None:
            model = self.models[name] = Model(name)
        elif model.where is not Where.ON_DISK or model.used:
            return model
        model.where, model.used = (
            Where.OPENING,
            True,
        )  # an image that was left open is looked at again: has its file changed?
        self._flights.start(ev.Open(self._flights.next_id(), name, model.image))
        return model

    def opened(self, model: Model, result: ev.Opened) -> None:
        if model.image is not None and model.image is not result.image:
            self._flights.emit(ev.Close(model.image))
        model.where, model.image, model.footprint = Where.ON_DISK, result.image, result.footprint

    def load(self, model: Model) -> None:
        """Claim memory and start the load of a model that is on disk. Raises Refused or Unsupported."""
        assert model.image is not None and model.where is Where.ON_DISK
        placement = model.place(self._memory, self._page_tokens)
        model.where = Where.LOADING
        self._flights.start(ev.Load(self._flights.next_id(), model.name, model.image, placement))

    def loaded(self, model: Model) -> None:
        model.where = Where.ON_DEVICE
        for ticket in model.load_tickets:
            self._flights.emit(ev.Reply(ticket))
        model.load_tickets.clear()

    def evict(self, model: Model) -> None:
        """Start to take an idle model off the device."""
        model.where = Where.EVICTING
        self._flights.start(ev.Unload(self._flights.next_id(), model.name))

    def rest(self, model: Model) -> None:
        """The model is off the device. Its image stays open for the next time; of those, the least recent give way."""
        model.displace(self._memory)
        for ticket in model.unload_tickets:
            self._flights.emit(ev.Reply(ticket))
        model.unload_tickets.clear()
        model.where, model.used = Where.ON_DISK, False
        resting = [other for other in self.models.values() if other.where is Where.ON_DISK and not other.used]
        if len(resting) > MAX_RESTING:
            self.forget(min(resting, key=lambda other: other.last_run))

    def forget(self, model: Model, error: Exception | None = None) -> None:
        """The model is gone, or could not be had: give back what it had, answer who asked for that, close its file."""
        model.displace(self._memory)
        for ticket in model.unload_tickets:
            self._flights.emit(ev.Reply(ticket, error))
        if error is not None:
            for ticket in model.load_tickets:
                self._flights.emit(ev.Reply(ticket, error))
            model.load_tickets.clear()
        if model.image is not None:
            self._flights.emit(ev.Close(model.image))
        del self.models[model.name]

    def infos(self) -> list[ModelInfo]:
        return [model.info(self._memory) for model in self.models.values()]

    def memory_info(self) -> MemoryInfo:
        return self._memory.info([model.placement.extents[-1] for model in self.models.values() if model.placement])
