"""Watches operations from outside: what is in flight, which pages and frames it names, and what may not begin then.

    page of a flight     not written by another one; not read by another one while it is written
    frames of weights    no page lies in them; they belong to one model

Knows pages and frames as numbers. The kernel's own ledger is not looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from llm_os.drivers.simulation.violation import Violation, insist
from llm_os.kernel import events as ev
from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, Placement


class _Pages:
    """The pages of one model that are named by operations in flight."""

    def __init__(self, placement: Placement, slots: int, token_bytes: int) -> None:
        self.page_bytes = placement.page_tokens * token_bytes
        self.page_tokens = placement.page_tokens
        self.total = placement.pages
        self.slots = slots
        self.named: dict[int, int] = {}  # how many operations name it
        self.written: set[int] = set()
        self.runs = 0
        self.salts: dict[int, int] = {}  # the tenant of what was last written


class Fences:
    """Every operation passes `start` when the core asks for it, and `end` when it has been performed."""

    def __init__(self, config: Config, frames: int) -> None:
        self.frames = frames
        self._config = config
        self._models: dict[str, _Pages] = {}  # with KV on the device
        self._loaded: dict[str, Placement] = {}  # from the start of a load to the end of an unload
        self.ready: set[str] = set()  # from the end of a load to the start of an unload
        self._fresh: set[str] = set()  # being loaded, with no KV on the device before
        self._weights: dict[int, str] = {}  # frames
        self._flights: dict[int, tuple[_Pages, tuple[int, ...], tuple[int, ...]]] = {}

    def start(self, operation: ev.Operation) -> None:
        match operation:
            case ev.Run(id, batch):
                self._start_run(id, batch)
            case ev.Copy(id, model, moves):
                pages = self._of(model)
                targets = tuple(move.target for move in moves)
                sources = tuple(move.source for move in moves)
                insist(len({*targets}) == len(targets) and not {*targets} & {*sources}, "copy", operation)
                self._fly(id, model, pages, sources, targets)
                for move in moves:
                    pages.salts[move.target] = pages.salts.get(move.source, -1)
            case ev.SwapOut(id, model, out):
                self._fly(id, model, self._of(model), out, ())
            case ev.SwapIn(id, model, _, into):
                self._fly(id, model, self._of(model), (), into)
            case ev.Load(_, model, image, placement):
                self._start_load(model, placement, getattr(image, "kv_bytes_per_token", 0))
            case ev.Unload(_, model):
                insist(model in self.ready, "unload", f"{model} is not loaded")
                self.ready.discard(model)
                insist(not self._models[model].runs, "fence", f"{model} is unloaded while a batch of it is in flight")
            case ev.Release(_, model):
                insist(model not in self._loaded, "release", f"{model} is loaded")
                insist(not self._of(model).named, "fence", f"KV of {model} is released while an operation names it")

    def end(self, operation: ev.Operation, failed: bool) -> None:
        match operation:
            case ev.Run() | ev.Copy() | ev.SwapOut() | ev.SwapIn():
                pages, named, written = self._flights.pop(operation.id)
                pages.runs -= isinstance(operation, ev.Run)
                counts = pages.named
                for page in named:
                    if counts[page] == 1:
                        del counts[page]
                    else:
                        counts[page] -= 1
                pages.written.difference_update(written)
            case ev.Load(_, model):
                if failed:
                    self._leave(model)
                    if model in self._fresh:
                        del self._models[model]
                else:
                    self.ready.add(model)
                self._fresh.discard(model)
            case ev.Unload(_, model):
                if failed:
                    self.ready.add(model)
                else:
                    self._leave(model)
            case ev.Release(_, model) if not failed:
                del self._models[model]

    def page_bytes(self, model: str) -> int:
        return self._of(model).page_bytes

    def salt(self, model: str, page: int) -> int:
        """Whose contents were last written to a page; -1 for nobody's."""
        return self._of(model).salts.get(page, -1)

    def write(self, model: str, page: int, salt: int) -> None:
        self._of(model).salts[page] = salt

    def _start_run(self, id: int, batch: Batch) -> None:
        insist(batch.model in self.ready, "run", f"{batch.model} is not loaded")
        insist(0 < len(batch.sequences) <= self._config.batch_size, "batch", "too many rows or none")
        fed = sum(rows.end - rows.position for rows in batch.sequences)
        insist(fed <= self._config.batch_tokens, "batch", f"{fed} tokens in a batch of {self._config.batch_tokens}")
        pages = self._of(batch.model)
        size = pages.page_tokens
        named: list[int] = []
        written: list[int] = []
        for rows in batch.sequences:
            table = rows.pages
            end = rows.end
            insist(rows.tokens and len(table) * size >= end, "page table", f"of process {rows.pid} is too short")
            named += table
            first = rows.position // size
            written += table[first : -(-end // size)]
            for page in table[: -(-rows.position // size)]:
                salt = pages.salts.get(page)
                insist(salt == rows.salt, "tenant", f"process {rows.pid} reads page {page} of another tenant ({salt})")
            for page in table[first : -(-end // size)]:
                pages.salts[page] = rows.salt
        if len({*named}) != len(named):
            count = Counter(named)
            insist(all(count[page] == 1 for page in written), "shared page", "of a batch is written by a row of it")
        self._fly(id, batch.model, pages, named, written)
        pages.runs += 1

    def _start_load(self, model: str, placement: Placement, token_bytes: int) -> None:
        insist(model not in self._loaded, "load", f"{model} is loaded already")
        frames = [f for extent in placement.extents for f in range(extent.frame, extent.frame + extent.frames)]
        insist(len({*frames}) == len(frames), "frame", f"the extents of {model} overlap")
        for frame in frames:
            insist(0 <= frame < self.frames, "budget", f"frame {frame} is given to {model}, there are {self.frames}")
            other = self._weights.setdefault(frame, model)
            insist(other == model, "frame", f"{frame} is given to {model} and is of {other}")
        for name, pages in self._models.items():
            for page in pages.named:
                other = self._weights.get(page // pages.slots, "")
                insist(not other, "fence", f"frame of page {page} of {name} is in flight and given to {other}")
        self._loaded[model] = placement
        if (kept := self._models.get(model)) is None:
            self._fresh.add(model)
            slots = max(1, placement.pages // self.frames)
            self._models[model] = _Pages(placement, slots, token_bytes)
        else:
            same = (kept.page_tokens, kept.total) == (placement.page_tokens, placement.pages)
            insist(same, "load", f"the kept pages of {model} change their size")

    def _leave(self, model: str) -> None:
        del self._loaded[model]
        for frame in [frame for frame, owner in self._weights.items() if owner == model]:
            del self._weights[frame]

    def _fly(self, id: int, model: str, pages: _Pages, read: Iterable[int], written: Iterable[int]) -> None:
        """For a batch, `read` are all the pages that it names."""
        read, written = tuple(read), tuple(written)
        named, writing, weights, slots = pages.named, pages.written, self._weights, pages.slots
        for page in read:
            if page in writing:
                raise Violation("fence", f"page {page} of {model} is being written by an operation in flight")
        for page in written:
            if page in named:
                raise Violation("fence", f"page {page} of {model} is written while an operation in flight names it")
            if page // slots in weights or not 0 <= page < pages.total:
                raise Violation("frame", f"page {page} of {model} lies in the weights of {weights.get(page // slots)}")
        every = tuple(dict.fromkeys((*read, *written)))
        for page in every:
            named[page] = named.get(page, 0) + 1
        writing.update(written)
        self._flights[id] = (pages, every, written)

    def _of(self, model: str) -> _Pages:
        insist(model in self._models, "pages", f"{model} has no KV on the device")
        return self._models[model]
