"""A device without tensors: the reference for the driver contract, and the judge of the kernel's page handling.

Each KV cell stores a hash of (model, tenant salt, token prefix, position): the hash of its token chained to the cell
before it, *as read through the page table*. The next token is a hash of all cells really read. A page that is stale,
aliased, lost, or somebody else's changes the tokens at once. `reference()` says in a few lines what they should be.
"""

from __future__ import annotations

import codecs
import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from msgspec import Struct, structs

from llm_os.kernel.config import Config
from llm_os.kernel.driver import (
    Batch,
    DeviceInfo,
    DeviceMemory,
    Footprint,
    Move,
    Placement,
    Row,
    RowError,
    Sample,
    Sampled,
)
from llm_os.kernel.driver import Sequence as Rows
from llm_os.kernel.errors import Closed, DriverError, Error, ModelNotFound, RequestError, Unsupported
from llm_os.kernel.image import Image
from llm_os.kernel.request import SamplingDefaults

_M64 = (1 << 64) - 1
_END = 256
_PIECES = (*(bytes((byte,)) for byte in range(256)), b"")
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

    def token_bytes(self) -> Sequence[bytes]:
        beyond = self.vocab_size - len(_PIECES)
        return _PIECES[: self.vocab_size] + (b"",) * beyond if beyond else _PIECES

    def decoder(self) -> SimDecoder:
        return SimDecoder()

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        try:
            return "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        except KeyError as error:
            raise RequestError(f"{self.name}: a message has no {error}; give role and content") from None

    def fresh(self) -> bool:
        return True

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


class Lone:
    """What a process answers that has the machine to itself: sequential, no pages, no batches. Feed it, then ask."""

    def __init__(self, image: SimImage, salt: int, tokens: Iterable[int] = ()) -> None:
        self._end_after = image.end_after
        self._cell = seed_of(image.name, salt)
        self._digest = 0
        self.fed = 0
        for token in tokens:
            self.feed(token)

    def feed(self, token: int) -> None:
        self._cell = chain(self._cell, token, self.fed)
        self._digest = fold(self._digest, self._cell)
        self.fed += 1

    def next(self, sample: Sample) -> int:
        return choose(self._digest, sample, self._end_after)


def fold(digest: int, cell: int) -> int:
    """What has been read so far, with one more cell."""
    return (digest * 0x100000001B3 ^ cell) & _M64


def choose(digest: int, sample: Sample, end_after: int) -> int:
    """The next token, a function of every cell read and of the randomness."""
    if sample.temperature > 0:
        digest ^= int(sample.uniform * 2**53)
    digest = chain(digest, 0, 0)
    ends = end_after and digest >> 8 & 0xFFFF < 0x10000 // end_after
    token = _END if ends else _LETTERS[digest % len(_LETTERS)]
    if sample.mask is None:
        return token
    bits = sample.mask.bits()
    allowed = [token for token in range(len(_PIECES)) if bits[token >> 3] >> (token & 7) & 1]
    return token if token in allowed else allowed[digest % len(allowed)]


def reference(image: SimImage, salt: int, prompt: Sequence[int], samples: Iterable[Sample]) -> Iterator[int]:
    """The answer of a lone process."""
    lone = Lone(image, salt, prompt)
    for sample in samples:
        token = lone.next(sample)
        yield token
        if token == _END:
            return
        lone.feed(token)


class SimDriver:
    """Computes at once, in the caller's thread. Frames are one arena: what is written into a frame, weights or another
    model's pages, turns what lay there into junk (as in xv6)."""

    def __init__(self, config: Config, total_bytes: int = 1 << 30) -> None:
        self._total = total_bytes
        self._frame_bytes = config.frame_bytes
        self._loaded: dict[str, SimImage] = {}
        self._known: dict[str, tuple[Placement, int]] = {}  # and pages per frame; until the release
        self._pages: dict[tuple[str, int], list[int]] = {}  # cells by (model, page); 0 is junk
        self._owners: dict[int, str] = {}  # whose KV was last written into a frame
        self._weights: dict[int, str] = {}  # whose weights lie in a frame
        self._spoiled: set[str] = set()  # models without all their weights: what they answer is junk
        self._closed = False

    def info(self) -> DeviceInfo:
        return DeviceInfo(driver="sim", device="simulated", total_bytes=self._total, free_bytes=self._total)

    def footprint(self, image: Image, batch_tokens: int) -> Footprint:
        if not isinstance(image, SimImage):
            raise Unsupported(f"{getattr(image, 'name', image)!r} has weights; the sim driver runs only sim: models")
        return Footprint(
            extents=(image.layer_bytes,) * image.layers,
            kv_bytes_per_token=image.kv_bytes_per_token,
            workspace=batch_tokens * 64,
            page_tokens=tuple(range(1, 65)),
        )

    def load(self, model: str, image: Image, placement: Placement) -> Future[None]:
        return self._now(lambda: self._load(model, image, placement))

    def unload(self, model: str) -> Future[None]:
        def unload() -> None:
            self._image(model)
            del self._loaded[model]
            self._spoiled.discard(model)
            self._weights = {frame: owner for frame, owner in self._weights.items() if owner != model}

        return self._now(unload)

    def release(self, model: str) -> Future[None]:
        def release() -> None:
            if model in self._loaded:
                raise DriverError(f"{model} is loaded; unload it before its KV is released")
            self._known.pop(model, None)
            for frame in [frame for frame, owner in self._owners.items() if owner == model]:
                del self._owners[frame]
            for key in [key for key in self._pages if key[0] == model]:
                del self._pages[key]

        return self._now(release)

    def prefetch(self, model: str, image: Image) -> Future[None]:
        return self._now(lambda: None)

    def run(self, batch: Batch) -> Future[tuple[Row, ...]]:
        def run() -> tuple[Row, ...]:
            image = self._image(batch.model)
            size = self._placement(batch.model)[0].page_tokens
            return tuple(self._row(batch.model, image, size, rows) for rows in batch.sequences)

        return self._now(run)

    def copy(self, model: str, moves: tuple[Move, ...]) -> Future[None]:
        def copy() -> None:
            for move in moves:
                self._write(model, move.target)[:] = self._read(model, move.source)

        return self._now(copy)

    def swap_out(self, model: str, pages: tuple[int, ...]) -> Future[tuple[bytes, ...]]:
        """Eight bytes for each token, whatever `kv_bytes_per_token` says: the cells."""
        return self._now(lambda: tuple(array("Q", self._read(model, page)).tobytes() for page in pages))

    def swap_in(self, model: str, pages: tuple[int, ...], contents: tuple[bytes, ...]) -> Future[None]:
        def swap_in() -> None:
            size = 8 * self._placement(model)[0].page_tokens
            if len(pages) != len(contents) or any(len(content) != size for content in contents):
                raise DriverError(f"{len(contents)} contents are not {len(pages)} pages of {size} bytes of {model}")
            for page in pages:
                self._check(model, page)
            for page, content in zip(pages, contents, strict=True):
                self._write(model, page)[:] = array("Q", content)

        return self._now(swap_in)

    def memory(self) -> DeviceMemory:
        weights = sum(image.layers * image.layer_bytes for image in list(self._loaded.values()))
        return DeviceMemory(weights=weights, kv=0)

    def close(self) -> None:
        self._closed = True
        for table in (self._loaded, self._known, self._pages, self._owners, self._weights, self._spoiled):
            table.clear()

    def _load(self, model: str, image: Image, placement: Placement) -> None:
        assert isinstance(image, SimImage)
        if model in self._loaded:
            raise DriverError(f"{model} is loaded already")
        slots = max(1, self._frame_bytes // (placement.page_tokens * image.kv_bytes_per_token))
        kept = self._known.setdefault(model, (placement, slots))[0]
        if (kept.page_tokens, kept.pages) != (placement.page_tokens, placement.pages):
            raise DriverError(f"{model} kept KV in pages of {kept.page_tokens} tokens; release it before they change")
        for extent in placement.extents:
            for frame in range(extent.frame, extent.frame + extent.frames):
                self._take(frame)
                self._weights[frame] = model
        self._loaded[model] = image

    def _row(self, model: str, image: SimImage, size: int, rows: Rows) -> Row:
        """Feed one row. Cells beyond `position` are written before they are read."""
        start, end = rows.position, rows.position + len(rows.tokens)
        pages = [self._read(model, page) for page in rows.pages[: -(-start // size)]]
        cell = pages[-1][(start - 1) % size] if start else seed_of(image.name, rows.salt)
        for position, token in enumerate(rows.fed, start):
            index, slot = divmod(position, size)
            if slot == 0 or position == start:
                pages[index:] = [self._write(model, rows.pages[index])]
            cell = pages[index][slot] = chain(cell, token, position)
        if rows.sample is None:
            return None
        digest, left = int(model in self._spoiled), end
        for cells in pages[: -(-end // size)]:
            for cell in cells[:left]:
                digest = (digest * 0x100000001B3 ^ cell) & _M64  # fold, without the call
            left -= size
        row, more = self._choose(digest, rows.sample, image), list[Sampled]()
        for position, guess in enumerate(rows.guesses, end):  # wrong ones too, so that whoever believes them is found
            digest = fold(digest, pages[position // size][position % size])
            following = self._choose(digest, guess.sample, image)
            if not isinstance(following, Sampled):
                break
            more.append(following)
        return structs.replace(row, more=tuple(more)) if more and isinstance(row, Sampled) else row

    def _choose(self, digest: int, sample: Sample, image: SimImage) -> Row:
        try:
            token = choose(digest, sample, image.end_after)
        except Error as error:  # of the mask
            return RowError(str(error), error)
        return Sampled(token) if sample.logprobs is None else Sampled(token, 0.0, ((token, 0.0),)[: sample.logprobs])

    def _read(self, model: str, page: int) -> list[int]:
        """The cells of a page, not to be changed."""
        cells = self._pages.get((model, page))
        return [0] * self._check(model, page)[0].page_tokens if cells is None else cells

    def _write(self, model: str, page: int) -> list[int]:
        """The cells of a page, to be changed: its frame is this model's from now on."""
        placement, slots = self._check(model, page)
        frame = page // slots
        if self._owners.get(frame) != model:
            self._take(frame)
            self._owners[frame] = model
        return self._pages.setdefault((model, page), [0] * placement.page_tokens)

    def _take(self, frame: int) -> None:
        """Whatever lies in a frame is junk from now on."""
        if owner := self._owners.pop(frame, None):
            slots = self._known[owner][1]
            for page in range(frame * slots, (frame + 1) * slots):
                self._pages.pop((owner, page), None)
        if owner := self._weights.pop(frame, None):
            self._spoiled.add(owner)

    def _check(self, model: str, page: int) -> tuple[Placement, int]:
        known = self._placement(model)
        if not 0 <= page < known[0].pages:
            raise DriverError(f"page {page} of {model} is outside 0..{known[0].pages - 1}")
        return known

    def _placement(self, model: str) -> tuple[Placement, int]:
        if model not in self._known:
            raise DriverError(f"{model} has no KV here: it was not loaded since its last release")
        return self._known[model]

    def _image(self, model: str) -> SimImage:
        if model not in self._loaded:
            raise DriverError(f"{model} is not loaded")
        return self._loaded[model]

    def _now(self, work: Callable[[], Any]) -> Future[Any]:
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
