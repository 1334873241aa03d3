"""A device without tensors: the reference for the driver contract, and the judge of the kernel's page handling.

Each KV cell stores a hash of (model, tenant salt, token prefix, position): the hash of its token chained to the cell
before it, *as read through the page table*. The next token is a hash of all cells really read. A page that is stale,
aliased, lost, or somebody else's changes the tokens at once. `reference()` says in a few lines what they should be.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
from msgspec import Struct

from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, DeviceInfo, DeviceMemory, Footprint, Move, Placement, Row, Sample, Sampled
from llm_os.kernel.driver import Sequence as Rows
from llm_os.kernel.errors import Closed, DriverError, ModelNotFound, Unsupported
from llm_os.kernel.image import Image
from llm_os.kernel.request import SamplingDefaults

T = TypeVar("T")
_M64 = (1 << 64) - 1
_END = 256
_LETTERS = b"etaoinshrdlcumwfgypbvkjxqz,.  \n"


class SimImage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model without weights; tokens are bytes, 256 ends the text. `sim:NAME?field=value&...` sets the fields."""

    name: str
    layers: int = 4
    layer_bytes: int = 1 << 20
    kv_bytes_per_token: int = 1 << 14
    context_length: int = 4096
    end_after: int = 0  # about one token in so many ends the text; 0 is never
    architecture: str = "sim"
    vocab_size: int = 257
    sampling_defaults: SamplingDefaults = SamplingDefaults()

    @classmethod
    def parse(cls, model: str) -> SimImage:
        """Raises ModelNotFound for a field that does not exist or a value that is no number."""
        fields: dict[str, Any] = dict(parse_qsl(model.partition("?")[2]))
        try:
            return msgspec.convert({**fields, "name": model}, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ModelNotFound(f"{model!r} is not a sim model: {error}") from None

    @property
    def turn_end_tokens(self) -> frozenset[int]:
        return frozenset({_END})

    @property
    def text_end_tokens(self) -> frozenset[int]:
        return frozenset({_END})

    def encode(self, text: str, *, raw: bool) -> list[int]:
        return list(text.encode())

    def decoder(self) -> SimDecoder:
        return SimDecoder()

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)

    def close(self) -> None:
        return


class SimDecoder:
    """Bytes to text, never half a character."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def seed_of(model: str, salt: int) -> int:
    """Where the chain of cells of this model and tenant begins."""
    return int.from_bytes(hashlib.blake2b(f"{model}\0{salt}".encode(), digest_size=8).digest(), "little")


def chain(cell: int, token: int, position: int) -> int:
    """The cell at `position`, from the one before it."""
    x = (cell ^ (token + 1) * 0x9E3779B97F4A7C15 ^ (position + 1) * 0xC2B2AE3D27D4EB4F) & _M64
    x = (x ^ x >> 29) * 0xBF58476D1CE4E5B9 & _M64
    return x ^ x >> 32


def choose(cells: Iterable[int], sample: Sample, end_after: int) -> int:
    """The next token, a function of every cell read and of the randomness."""
    digest = 0
    for cell in cells:
        digest = (digest * 0x100000001B3 ^ cell) & _M64
    if sample.temperature > 0:
        digest ^= int(sample.uniform * 2**53)
    digest = chain(digest, 0, 0)
    if end_after and digest >> 8 & 0xFFFF < 0x10000 // end_after:
        return _END
    return _LETTERS[digest % len(_LETTERS)]


def reference(image: SimImage, salt: int, prompt: Sequence[int], samples: Iterable[Sample]) -> Iterator[int]:
    """What a lone process answers: sequential, no pages, no batches."""
    cells, tokens = [seed_of(image.name, salt)], list(prompt)
    for sample in samples:
        for position in range(len(cells) - 1, len(tokens)):
            cells.append(chain(cells[-1], tokens[position], position))
        tokens.append(choose(cells[1:], sample, image.end_after))
        yield tokens[-1]
        if tokens[-1] == _END:
            return


class SimDriver:
    """Computes at once, in the caller's thread. Cells of frames that were given back are junk (as in xv6)."""

    def __init__(self, config: Config, total_bytes: int = 1 << 30) -> None:
        self._total = total_bytes
        self._loaded: dict[str, tuple[SimImage, Placement]] = {}
        self._cells: dict[tuple[str, int, int], int] = {}  # (model, page, slot)
        self._closed = False

    def info(self) -> DeviceInfo:
        return DeviceInfo(driver="sim", device="simulated", total_bytes=self._total, free_bytes=self._total)

    def footprint(self, image: Image, batch_tokens: int) -> Footprint:
        if not isinstance(image, SimImage):
            raise Unsupported(f"{image.name} has weights; the sim driver runs only sim: models")
        return Footprint(
            extents=(image.layer_bytes,) * image.layers,
            kv_bytes_per_token=image.kv_bytes_per_token,
            workspace=batch_tokens * 64,
            page_tokens=tuple(range(1, 65)),
        )

    def load(self, model: str, image: Image, placement: Placement) -> Future[None]:
        def load() -> None:
            assert isinstance(image, SimImage)
            if model in self._loaded:
                raise DriverError(f"{model} is loaded already")
            self._loaded[model] = (image, placement)

        return self._now(load)

    def unload(self, model: str) -> Future[None]:
        def unload() -> None:
            self._image(model)
            del self._loaded[model]
            self._cells = {key: cell for key, cell in self._cells.items() if key[0] != model}

        return self._now(unload)

    def run(self, batch: Batch) -> Future[tuple[Row, ...]]:
        return self._now(lambda: tuple(self._row(batch.model, sequence) for sequence in batch.sequences))

    def copy(self, model: str, moves: tuple[Move, ...]) -> Future[None]:
        def copy() -> None:
            _, placement = self._image(model)
            for move in moves:
                for slot in range(placement.page_tokens):
                    cell = self._cells.get((model, move.source, slot), 0)
                    self._cells[model, move.target, slot] = cell

        return self._now(copy)

    def memory(self) -> DeviceMemory:
        weights = sum(image.layers * image.layer_bytes for image, _ in list(self._loaded.values()))
        return DeviceMemory(weights=weights, kv=0)

    def close(self) -> None:
        self._closed = True
        self._loaded.clear()
        self._cells.clear()

    def _row(self, model: str, rows: Rows) -> Row:
        image, placement = self._image(model)

        def key(position: int) -> tuple[str, int, int]:
            index, slot = divmod(position, placement.page_tokens)
            page = rows.pages[index]
            if not 0 <= page < placement.pages:
                raise DriverError(f"page {page} of {model} is outside 0..{placement.pages - 1}")
            return model, page, slot

        cell = self._cells.get(key(rows.position - 1), 0) if rows.position else seed_of(image.name, rows.salt)
        for position, token in enumerate(rows.tokens, rows.position):
            cell = self._cells[key(position)] = chain(cell, token, position)
        if rows.sample is None:
            return None
        end = rows.position + len(rows.tokens)
        token = choose((self._cells.get(key(p), 0) for p in range(end)), rows.sample, image.end_after)
        logprobs = rows.sample.logprobs
        return Sampled(token) if logprobs is None else Sampled(token, 0.0, ((token, 0.0),)[:logprobs])

    def _image(self, model: str) -> tuple[SimImage, Placement]:
        if model not in self._loaded:
            raise DriverError(f"{model} is not loaded")
        return self._loaded[model]

    def _now(self, work: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            if self._closed:
                raise Closed("the sim driver is closed")
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        return future


def probe_sim() -> DeviceInfo:
    return DeviceInfo(driver="sim", device="simulated", total_bytes=1 << 30, free_bytes=1 << 30)
