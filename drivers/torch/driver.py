"""The driver contract over torch tensors, shared by the cpu and cuda drivers. Knows models by name; decides nothing.

Four workers, each in the order of what it was asked for, so that nothing waits for what takes longer than itself:

    batches   run, copy, unload, release
    swaps     swap_out, swap_in
    loads     load
    files     prefetch
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from threading import Lock
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch
from msgspec import Struct, structs

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.formats.changed import stored
from llm_os.drivers.formats.weights import Weights
from llm_os.drivers.native.decoder import NativeDecoder
from llm_os.drivers.native.footprint import measure_native
from llm_os.drivers.native.packed import fits
from llm_os.drivers.native.processor import can_compile
from llm_os.drivers.native.threads import Team
from llm_os.drivers.torch.allocator import releasing
from llm_os.drivers.torch.arena import Arena
from llm_os.drivers.torch.attention import Stretch
from llm_os.drivers.torch.decoder import Decoder
from llm_os.drivers.torch.footprint import measure
from llm_os.drivers.torch.linear import choose_format
from llm_os.drivers.torch.page_cache import leave_all, warm
from llm_os.drivers.torch.pool import KvPool, Layout
from llm_os.drivers.torch.sampler import sample
from llm_os.kernel.driver import (
    Batch,
    DeviceInfo,
    DeviceMemory,
    Footprint,
    Move,
    Placement,
    Row,
    Sample,
    Sampled,
    Sequence,
)
from llm_os.kernel.errors import Closed, DriverError, Unsupported
from llm_os.kernel.image import Image

if TYPE_CHECKING:
    from llm_os.kernel.config import Config

_Result = TypeVar("_Result")


class _Contents(Protocol):
    """What `drivers/formats` images have beyond the kernel's `Image`."""

    hyperparameters: Architecture
    weights: Weights


class _Resident(Struct, frozen=True):
    """A model on the device."""

    architecture: Architecture
    decoder: Decoder | NativeDecoder
    pool: KvPool


class TorchDriver:
    """A `Driver` for one torch device."""

    def __init__(
        self, config: Config, device: torch.device, page_tokens: tuple[int, ...], probe: Callable[[], DeviceInfo]
    ) -> None:
        """`page_tokens` are the page sizes that the device takes well; `probe` answers `info()`."""
        self._device = device
        self._page_tokens = page_tokens
        self._probe = probe
        self._format = choose_format(config.precision, device)
        self._models: dict[str, _Resident] = {}
        self._arena = Arena(config.frame_bytes, config.budget(probe().total_bytes) // config.frame_bytes, device)
        self._threads = config.threads if device.type == "cpu" else None
        self._threads_before = torch.get_num_threads()
        self._team: Team | None = None  # where models run as native code
        if device.type == "cpu" and config.precision == "fast" and can_compile():
            self._team = Team(config.threads or torch.get_num_threads(), "llm-os-cpu-team")
        self._batches = ThreadPoolExecutor(1, f"llm-os-{device.type}")
        self._swaps = ThreadPoolExecutor(1, f"llm-os-{device.type}-swap")
        self._loads = ThreadPoolExecutor(1, f"llm-os-{device.type}-load")
        self._files = ThreadPoolExecutor(1, f"llm-os-{device.type}-file")
        self._lock = Lock()
        self._closed = False

    def info(self) -> DeviceInfo:
        return self._probe()

    def footprint(self, image: Image, batch_tokens: int) -> Footprint:
        contents = _contents(image)
        if (team := self._team_for(contents)) is not None:
            return measure_native(contents.hyperparameters, contents.weights, batch_tokens, team.count)
        return measure(contents.hyperparameters, contents.weights, self._format, batch_tokens, self._page_tokens)

    def load(self, model: str, image: Image, placement: Placement) -> Future[None]:
        return self._submit(self._loads, lambda: self._load(model, image, placement))

    def unload(self, model: str) -> Future[None]:
        return self._submit(self._batches, lambda: self._unload(model))

    def release(self, model: str) -> Future[None]:
        return self._submit(self._batches, lambda: self._release(model))

    def prefetch(self, model: str, image: Image) -> Future[None]:
        return self._submit(self._files, lambda: self._prefetch(image))

    def run(self, batch: Batch) -> Future[tuple[Row, ...]]:
        return self._submit(self._batches, lambda: self._run(batch))

    def copy(self, model: str, moves: tuple[Move, ...]) -> Future[None]:
        return self._submit(self._batches, lambda: self._copy(model, moves))

    def swap_out(self, model: str, pages: tuple[int, ...]) -> Future[tuple[bytes, ...]]:
        return self._submit(self._swaps, lambda: self._swap_out(model, pages))

    def swap_in(self, model: str, pages: tuple[int, ...], contents: tuple[bytes, ...]) -> Future[None]:
        return self._submit(self._swaps, lambda: self._swap_in(model, pages, contents))

    def memory(self) -> DeviceMemory:
        weights = sum(resident.decoder.nbytes for resident in list(self._models.values()))
        return DeviceMemory(weights=weights, kv=self._arena.nbytes)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        with self._releasing():  # threads give back what they hold when they end
            for worker in (self._files, self._loads, self._swaps, self._batches):
                worker.shutdown()
            self._models.clear()
            self._arena.clear()
            if self._team is not None:
                self._team.close()
        if self._threads is not None and torch.get_num_threads() == self._threads:
            torch.set_num_threads(self._threads_before)

    def _submit(self, worker: ThreadPoolExecutor, operation: Callable[[], _Result]) -> Future[_Result]:
        with self._lock:
            if self._closed:
                raise Closed(f"the {self._device.type} driver is closed")
            return worker.submit(self._perform, operation)

    def _perform(self, operation: Callable[[], _Result]) -> _Result:
        # torch keeps this number for the process and for each thread, and another kernel may have set it since.
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                return operation()
        except (RuntimeError, MemoryError, OSError) as error:  # torch reports a full device as a RuntimeError
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise DriverError(f"the {self._device.type} device failed: {reason}") from error

    def _load(self, model: str, image: Image, placement: Placement) -> None:
        if model in self._models:
            raise DriverError(f"model {model!r} is already loaded; unload it first")
        contents = _contents(image)
        a = contents.hyperparameters
        kept = self._arena.holds(model)
        try:
            team = self._team_for(contents)
            dtype = torch.float32 if team is None else torch.float16
            pool = self._arena.open(model, a, placement.page_tokens, placement.pages, dtype)
            with self._releasing():  # also what opening the image has left: weights come on top of it
                self._arena.displace(placement.extents)
            decoder = self._decoder(contents, team)
            leave_all(stored(contents.weights))
        except Exception as error:
            with self._releasing():
                traceback.clear_frames(error.__traceback__)  # they hold what was loaded so far
                if not kept:
                    self._arena.release(model)
            raise
        with self._releasing():
            self._models[model] = _Resident(a, decoder, pool)

    def _team_for(self, contents: _Contents) -> Team | None:
        """Who computes the model as native code; None where torch does."""
        return self._team if fits(contents.hyperparameters) else None

    def _decoder(self, contents: _Contents, team: Team | None) -> Decoder | NativeDecoder:
        if team is not None:
            return NativeDecoder(contents.hyperparameters, contents.weights, team)
        return Decoder(contents.hyperparameters, contents.weights, self._format)

    def _unload(self, model: str) -> None:
        self._resident(model)
        with self._releasing():
            del self._models[model]

    def _release(self, model: str) -> None:
        if model in self._models:
            raise DriverError(f"model {model!r} is loaded and needs its KV; unload it before releasing it")
        self._arena.release(model)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _prefetch(self, image: Image) -> None:
        warm(stored(_contents(image).weights))

    def _copy(self, model: str, moves: tuple[Move, ...]) -> None:
        pool = self._arena.pool(model)
        for move in moves:
            _check_pages(pool, (move.source, move.target))
        self._arena.claim(model, pool.frames_of(move.target for move in moves))
        pool.copy(moves)

    def _swap_out(self, model: str, pages: tuple[int, ...]) -> tuple[bytes, ...]:
        pool = self._arena.pool(model)
        _check_pages(pool, pages)
        if not self._arena.owns(model, pool.frames_of(pages)):
            raise DriverError(f"model {model!r} has no KV in some of the pages to swap: others have taken their frames")
        return pool.read(pages)

    def _swap_in(self, model: str, pages: tuple[int, ...], contents: tuple[bytes, ...]) -> None:
        pool = self._arena.pool(model)
        _check_pages(pool, pages)
        pool.check(pages, contents)
        self._arena.claim(model, pool.frames_of(pages))
        pool.restore(pages, contents)

    def _run(self, batch: Batch) -> tuple[Row, ...]:
        resident = self._resident(batch.model)
        stretches = _lay_out(batch.sequences, resident)
        self._arena.claim(batch.model, set[int]().union(*(s.layout.frames(s.position, s.end) for s in stretches)))
        tokens = [token for sequence in batch.sequences for token in sequence.fed]
        wishes: list[Sample] = []
        guesses: list[int | None] = []  # what the row was fed, if it was fed a guess
        places: list[int] = []  # its row of all
        owners: list[int] = []
        for index, (sequence, stretch) in enumerate(zip(batch.sequences, stretches, strict=True)):
            if sequence.sample is not None:
                count = 1 + len(sequence.guesses)
                wishes += [sequence.sample, *[guess.sample for guess in sequence.guesses]]
                guesses += [None, *[guess.token for guess in sequence.guesses]]
                places += range(stretch.row + stretch.length - count, stretch.row + stretch.length)
                owners += [index] * count
        chosen: list[Row] = []
        for scores in resident.decoder.scores(tokens, stretches, resident.pool, places):
            part = slice(len(chosen), len(chosen) + len(scores.logits))
            chosen += sample(scores, wishes[part], guesses[part], chosen[-1] if chosen else None)
        rows: list[list[Row]] = [[] for _ in batch.sequences]
        for index, row in zip(owners, chosen, strict=True):
            rows[index].append(row)
        return tuple(_joined(group) for group in rows)

    @contextmanager
    def _releasing(self) -> Iterator[None]:
        """What is freed inside goes back to the system."""
        with releasing():
            yield
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _resident(self, model: str) -> _Resident:
        resident = self._models.get(model)
        if resident is None:
            raise DriverError(f"model {model!r} is not loaded on the {self._device.type} device; load it first")
        return resident


def _contents(image: Image) -> _Contents:
    if not (hasattr(image, "hyperparameters") and hasattr(image, "weights")):
        raise Unsupported(f"{image.name} has no weights that this driver can read; use a GGUF file or safetensors")
    return cast(_Contents, image)


def _joined(rows: list[Row]) -> Row:
    """The rows of one sequence, the one for its last token and those for its guesses, as one."""
    if len(rows) < 2 or not isinstance(rows[0], Sampled):
        return rows[0] if rows else None
    more = takewhile(lambda row: isinstance(row, Sampled), rows[1:])
    return structs.replace(rows[0], more=tuple(more))


def _lay_out(sequences: tuple[Sequence, ...], resident: _Resident) -> list[Stretch]:
    """One stretch of rows for each sequence. Raises DriverError for what the kernel must never ask."""
    pool, vocab = resident.pool, resident.architecture.vocab_size
    stretches: list[Stretch] = []
    row = 0
    for sequence in sequences:
        end = sequence.end
        if not sequence.tokens or sequence.position < 0 or end > len(sequence.pages) * pool.page_tokens:
            raise DriverError(f"process {sequence.pid}: its pages do not cover positions {sequence.position} to {end}")
        if not all(0 <= token < vocab for token in sequence.fed):
            raise DriverError(f"process {sequence.pid}: a token id is outside the vocabulary of {vocab}")
        _check_pages(pool, sequence.pages)
        layout = Layout(sequence.pages, pool.page_tokens, pool.slots)
        stretches.append(Stretch(row, end - sequence.position, sequence.position, layout))
        row += end - sequence.position
    return stretches


def _check_pages(pool: KvPool, pages: tuple[int, ...]) -> None:
    if pages and (min(pages) < 0 or max(pages) >= pool.pages):
        raise DriverError(f"a page number of {min(pages)} to {max(pages)} is outside the model's {pool.pages} pages")
