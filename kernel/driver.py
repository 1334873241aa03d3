"""The driver contract: what the kernel asks of a device, and nothing about how it is done.

A driver is one device. It owns every tensor, buffer and thread behind these calls; the kernel owns the account of its
memory. Operations return a `concurrent.futures.Future` at once and complete later, from any thread. Several may be in
flight, and they may complete in any order: the kernel never issues an operation that depends on one that has not
completed. A failed operation sets an exception; it leaves the device as it was before the call.

Rows of a batch are independent: what a row answers must not depend on the other rows (Rule 4).

`tests/drivers/` is the conformance suite; `drivers/sim.py` is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from llm_os.kernel.errors import DriverError, Error
from llm_os.kernel.image import Image

if TYPE_CHECKING:
    from llm_os.kernel.config import Config


class DeviceInfo(Struct, frozen=True, kw_only=True):
    """What a device is, as `llm-os doctor` shows it."""

    driver: str
    device: str  # "Intel(R) Xeon(R) Processor, 2 threads"
    total_bytes: int  # memory of the device; 0 when the driver is not available
    free_bytes: int
    features: tuple[str, ...] = ()  # "avx512_vnni", "bf16", ...
    details: dict[str, str] = {}  # library versions and the like
    unavailable: str | None = None  # why it cannot be used here; None when it can


class Footprint(Struct, frozen=True, kw_only=True):
    """What a model costs on this device, in bytes, before it is loaded."""

    extents: tuple[int, ...]  # weights, one entry per part that must be contiguous
    kv_bytes_per_token: int
    workspace: int  # scratch for the largest batch
    page_tokens: tuple[int, ...]  # page sizes that the driver can address, in tokens

    def __post_init__(self) -> None:
        """Raises DriverError where the ledger could not be kept with these numbers."""
        sizes = (*self.extents, self.workspace, self.kv_bytes_per_token - 1, *(n - 1 for n in self.page_tokens))
        if not self.page_tokens or min(sizes) < 0:
            raise DriverError(f"a driver gave an impossible footprint: {self}")


class Extent(Struct, frozen=True):
    """A contiguous run of frames."""

    frame: int
    frames: int


class Placement(Struct, frozen=True, kw_only=True):
    """Where a model lies: its weights' extents, and how its KV pages are cut."""

    extents: tuple[Extent, ...]  # as many as Footprint.extents, then one for the workspace
    page_tokens: int  # tokens per KV page
    pages: int  # page numbers of this model are in range(pages)


class Mask(Protocol):
    """Which tokens a row may choose: computed by a plugin while the device computes the row."""

    def begin(self) -> None:
        """Start computing it. The kernel has done so when a driver sees it."""
        ...

    def bits(self) -> bytes:
        """Bit i % 8 of byte i // 8 is token i, for all tokens of the vocabulary at least, and one of them is set.

        Waits until it is there, so ask for it after the row's forward pass; the same every time. Raises an Error where
        the plugin fails or takes too long: then the row's answer is `RowError(str(error), error)`, other rows stand.
        """
        ...


class Sample(Struct, frozen=True, kw_only=True):
    """How to choose the next token of one row. The driver has no random state: `uniform` is the randomness."""

    uniform: float  # in [0, 1), from (seed, position)
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt: tuple[int, ...] = ()  # filled only when a penalty needs them
    output: tuple[int, ...] = ()
    logprobs: int | None = None  # how many alternatives to report; None reports nothing
    mask: Mask | None = None  # of the tokens that may be chosen, after penalties and bias, before all else; None is all


class Guess(Struct, frozen=True):
    """A token that may be what is chosen before it, and how to choose the one after it if so."""

    token: int
    sample: Sample


class Sequence(Struct, frozen=True, kw_only=True):
    """One process's share of a batch: feed `tokens` at `position`, then maybe choose the next one.

    With `guesses`, feed them too, in order, behind `tokens`, and choose a token after each: one forward pass may bring
    several tokens of an answer (`Sampled.more`). A driver that leaves them out is right, and no quicker.
    """

    pid: int
    salt: int  # of the tenant; only `sim` reads it, to tell foreign pages apart
    tokens: tuple[int, ...]  # at least one
    position: int  # of tokens[0]
    pages: tuple[int, ...]  # page table; covers position + len(tokens) + len(guesses)
    sample: Sample | None  # None while the prompt is not finished
    guesses: tuple[Guess, ...] = ()  # only with a sample

    @property
    def fed(self) -> tuple[int, ...]:
        """Tokens, then guesses: what lies in the cells from `position` to `end` afterwards."""
        return self.tokens + tuple([guess.token for guess in self.guesses]) if self.guesses else self.tokens

    @property
    def end(self) -> int:
        return self.position + len(self.tokens) + len(self.guesses)


class Batch(Struct, frozen=True, kw_only=True):
    """One forward pass of one model. No page is written by two sequences."""

    model: str
    sequences: tuple[Sequence, ...]


class Sampled(Struct, frozen=True):
    """The token chosen for a row, and its log-probability under the model (before temperature and filters)."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens, best first
    more: tuple[Sampled, ...] = ()  # what was chosen after each guess. It may end where a guess is not what was chosen
    # before it: what follows is worth nothing. It ends where a row failed


class RowError(Struct, frozen=True):
    """This row failed (a NaN, say); the other rows of the batch stand."""

    message: str
    cause: Error | None = None  # raised by `Sample.mask`: the row's KV is sound, and this ends the process


Row = Sampled | RowError | None  # None where `sample` was None


class Move(Struct, frozen=True):
    """Copy one whole KV page onto another of the same model."""

    source: int
    target: int


class DeviceMemory(Struct, frozen=True, kw_only=True):
    """What the driver has really allocated, in bytes, for comparison with the ledger."""

    weights: int
    kv: int


class Driver(Protocol):
    """One device. Made by the factory that a plugin registered; used by one kernel.

    Frames are one memory: what is written into a frame, weights or another model's pages, ends what lay there before.
    The kernel has released it by then, so a device without a real arena gives it back at that moment at the latest.

    Operations come from the kernel's thread; `info`, `footprint` and `memory` may come from any thread at any time.
    """

    def info(self) -> DeviceInfo:
        """Cheap, callable at any time."""
        ...

    def footprint(self, image: Image, batch_tokens: int) -> Footprint:
        """What `image` would cost here, for batches of at most `batch_tokens` tokens. Raises Unsupported."""
        ...

    def load(self, model: str, image: Image, placement: Placement) -> Future[None]:
        """Bring the weights to the device. `model` names them from now on.

        KV that the model kept through an `unload` is still there: `page_tokens` and `pages` are as they were.
        """
        ...

    def unload(self, model: str) -> Future[None]:
        """Give back weights and workspace. KV pages stay, to be copied or swapped, until `release`."""
        ...

    def release(self, model: str) -> Future[None]:
        """Give back the KV memory of a model that is not loaded. No page of it is needed any more."""
        ...

    def prefetch(self, model: str, image: Image) -> Future[None]:
        """Bring the weights near, into host memory, so that `load` will be quicker. Takes no device memory."""
        ...

    def run(self, batch: Batch) -> Future[tuple[Row, ...]]:
        """One forward pass; one Row per sequence, in order."""
        ...

    def copy(self, model: str, moves: tuple[Move, ...]) -> Future[None]:
        """Copy pages, as if all at once: no target is a source of the same call."""
        ...

    def swap_out(self, model: str, pages: tuple[int, ...]) -> Future[tuple[bytes, ...]]:
        """The contents of whole pages, page_tokens * kv_bytes_per_token bytes each, laid out as the driver likes.

        The model need not be loaded; its KV must be there.
        """
        ...

    def swap_in(self, model: str, pages: tuple[int, ...], contents: tuple[bytes, ...]) -> Future[None]:
        """Write what `swap_out` returned into pages, maybe others than it came from. The model need not be loaded, but
        must have been since its last `release`."""
        ...

    def memory(self) -> DeviceMemory: ...

    def close(self) -> None:
        """Wait for what is in flight, then give everything back. Idempotent. Operations after it raise Closed."""
        ...


DriverFactory = Callable[["Config"], Driver]  # raises DriverError where the device is not there
DriverProbe = Callable[[], DeviceInfo]  # never raises: `unavailable` says why not
