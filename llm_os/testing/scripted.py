"""A model that is a Python function of the conversation: for tests of what is around models. Tokens are bytes.

    Scripted(lambda conversation: "the answer")     conversation: all text up to the assistant's turn, marks included

A driver as any other: the tokens lie in pages and are read through page tables, so a page that is lost or another's
changes what the function sees. The chat template is ChatML; tools are listed in a turn of their own. 256 and 257 are
`<|im_end|>` and `<|im_start|>`, which text that is encoded raw cannot contain.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from msgspec import Struct

from llm_os.kernel.driver import Batch, DeviceInfo, DeviceMemory, Footprint, Move, Placement, Row, Sampled
from llm_os.kernel.driver import Sequence as Rows
from llm_os.kernel.errors import DriverError
from llm_os.kernel.image import Image
from llm_os.kernel.request import SamplingDefaults

END, START = 256, 257
_MARKS = {"<|im_end|>": END, "<|im_start|>": START}
_TEXTS = {token: text.encode() for text, token in _MARKS.items()}
_SPLIT = re.compile("(<\\|im_end\\|>|<\\|im_start\\|>)")
_PIECES = (*(bytes([byte]) for byte in range(256)), b"", b"")
_TURN = [START, *b"assistant\n"]

Script = Callable[[str], str]


class ScriptedImage(Struct, frozen=True, kw_only=True):
    """The model `scripted:NAME`."""

    name: str
    architecture: str = "scripted"
    context_length: int = 65536
    vocab_size: int = 258
    turn_end_tokens: frozenset[int] = frozenset({END})
    text_end_tokens: frozenset[int] = frozenset({END})
    sampling_defaults: SamplingDefaults = SamplingDefaults(temperature=0.0)

    def encode(self, text: str, *, raw: bool) -> list[int]:
        if raw:
            return list(text.encode(errors="replace"))
        return [
            token
            for part in _SPLIT.split(text)
            for token in ([_MARKS[part]] if part in _MARKS else part.encode(errors="replace"))
        ]

    def token_bytes(self) -> Sequence[bytes]:
        return _PIECES

    def decoder(self) -> ScriptedDecoder:
        return ScriptedDecoder()

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        listed = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
        first = f"<|im_start|>tools\n{listed}<|im_end|>\n" if tools else ""
        said = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return f"{first}{said}<|im_start|>assistant\n"

    def fresh(self) -> bool:
        return True

    def close(self) -> None:
        return


class ScriptedDecoder:
    """Bytes to text, never half a character; marks are not shown."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class Scripted:
    """The driver. `script` is asked for an answer once for each conversation; it must be a pure function."""

    def __init__(self, script: Script, total_bytes: int = 1 << 30) -> None:
        self._script = script
        self._total = total_bytes
        self._answers: dict[tuple[int, ...], bytes] = {}
        self._placements: dict[str, Placement] = {}
        self._loaded: set[str] = set()
        self._pages: dict[tuple[str, int], list[int]] = {}

    def info(self) -> DeviceInfo:
        return DeviceInfo(driver="scripted", device="a function", total_bytes=self._total, free_bytes=self._total)

    def footprint(self, image: Image, batch_tokens: int) -> Footprint:
        return Footprint(extents=(1 << 16,), kv_bytes_per_token=1 << 10, workspace=0, page_tokens=tuple(range(1, 65)))

    def load(self, model: str, image: Image, placement: Placement) -> Future[None]:
        def load() -> None:
            self._placements.setdefault(model, placement)
            self._loaded.add(model)

        return _now(load)

    def unload(self, model: str) -> Future[None]:
        return _now(lambda: self._loaded.discard(model))

    def release(self, model: str) -> Future[None]:
        def release() -> None:
            self._placements.pop(model, None)
            self._pages = {key: page for key, page in self._pages.items() if key[0] != model}

        return _now(release)

    def prefetch(self, model: str, image: Image) -> Future[None]:
        return _now(lambda: None)

    def run(self, batch: Batch) -> Future[tuple[Row, ...]]:
        return _now(lambda: tuple(self._row(batch.model, rows) for rows in batch.sequences))

    def copy(self, model: str, moves: tuple[Move, ...]) -> Future[None]:
        def copy() -> None:
            for move in moves:
                self._pages[model, move.target] = list(self._page(model, move.source))

        return _now(copy)

    def swap_out(self, model: str, pages: tuple[int, ...]) -> Future[tuple[bytes, ...]]:
        size = self._size(model) * (1 << 10)
        return _now(lambda: tuple(json.dumps(self._page(model, page)).encode().ljust(size) for page in pages))

    def swap_in(self, model: str, pages: tuple[int, ...], contents: tuple[bytes, ...]) -> Future[None]:
        def swap_in() -> None:
            for page, content in zip(pages, contents, strict=True):
                self._pages[model, page] = json.loads(content)

        return _now(swap_in)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(weights=len(self._loaded) << 16, kv=0)

    def close(self) -> None:
        self._pages.clear()
        self._loaded.clear()

    def _row(self, model: str, rows: Rows) -> Row:
        if model not in self._loaded:
            raise DriverError(f"{model} is not loaded")
        size = self._size(model)
        for position, token in enumerate(rows.tokens, rows.position):
            self._page(model, rows.pages[position // size])[position % size] = token
        if rows.sample is None:
            return None
        end = rows.position + len(rows.tokens)
        cells: list[int] = []
        for page in rows.pages[: -(-end // size)]:
            cells += self._page(model, page)
        del cells[end:]
        turn = next((at for at in range(len(cells) - 1, -1, -1) if cells[at : at + len(_TURN)] == _TURN), None)
        if turn is None:
            return Sampled(END)
        before, said = tuple(cells[:turn]), _text(cells[turn + len(_TURN) :])
        answer = self._answers.get(before)
        if answer is None:
            answer = self._answers[before] = self._script(_text(before).decode(errors="replace")).encode()
        over = len(said) >= len(answer) or not answer.startswith(said)
        return Sampled(END if over else answer[len(said)])

    def _page(self, model: str, page: int) -> list[int]:
        return self._pages.setdefault((model, page), [0] * self._size(model))

    def _size(self, model: str) -> int:
        if model not in self._placements:
            raise DriverError(f"{model} has no KV here")
        return self._placements[model].page_tokens


def _text(cells: Sequence[int]) -> bytes:
    return b"".join(_TEXTS.get(cell) or bytes([cell]) for cell in cells)


def _now(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future
