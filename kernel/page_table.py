"""Where a process's KV lies: token position -> page. Page numbers only; tensors live in drivers.

position   0 ........ T-1 | T ....... 2T-1 | 2T ...
page            pages[0]  |     pages[1]   | pages[2]
"""

from __future__ import annotations

from llm_os.kernel.driver import Move
from llm_os.kernel.memory import Slab


class PageTable:
    """The pages of one process, in order. Pages may be shared with a fork until one of them writes."""

    def __init__(self, slab: Slab, pages: list[int] | None = None) -> None:
        self.slab = slab
        self.pages = pages or []

    def shortage(self, position: int, end: int) -> int:
        """How many pages `prepare` would allocate."""
        new = max(0, -(-end // self.slab.page_tokens) - len(self.pages))
        return new + (self._shared(position) is not None)

    def prepare(self, position: int, end: int) -> Move | None:
        """Make [position, end) writable: add pages, and replace a shared page that would be written.

        Returns the copy to perform before writing, if one is needed; the table's reference to the source passes to
        the caller, who releases it when the copy is done. The caller has checked `shortage`.
        """
        move = None
        if (index := self._shared(position)) is not None:
            move = Move(source=self.pages[index], target=self._allocate())
            self.pages[index] = move.target
        while len(self.pages) * self.slab.page_tokens < end:
            self.pages.append(self._allocate())
        return move

    def fork(self, computed: int) -> PageTable:
        """A second table over the pages of the first `computed` tokens. Pages that were added ahead stay this one's."""
        pages = self.pages[: -(-computed // self.slab.page_tokens)]
        self.slab.retain(pages)
        return PageTable(self.slab, pages)

    def release(self) -> None:
        self.slab.release(self.pages)
        self.pages = []

    def _shared(self, position: int) -> int | None:
        """The page that holds `position`, if another process maps it too. Later pages are never shared: a fork
        takes only what is computed."""
        index = position // self.slab.page_tokens
        if index < len(self.pages) and self.slab.references[self.pages[index]] > 1:
            return index
        return None

    def _allocate(self) -> int:
        page = self.slab.allocate()
        assert page is not None, "prepare was called without checking shortage"
        return page
