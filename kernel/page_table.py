"""Where a process's KV lies: token position -> page. Pages only; tensors live in drivers.

position   0 ........ T-1 | T ....... 2T-1 | 2T ...
page            pages[0]  |     pages[1]   | pages[2]

Pages may be shared, with forks and with the prefix cache. Who writes makes sure first that the page is its own
(copy on write, as `fork` does it in Unix).
"""

from __future__ import annotations

from llm_os.kernel.slab import Page, Slab


class PageTable:
    """The pages of one process, in order. Each entry holds its page."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.pages: list[Page] = []
        self.keys: list[bytes] = []  # names by content of the full pages, as far as they are known
        self._numbers: tuple[int, ...] = ()
        self._moves = 0

    def numbers(self) -> tuple[int, ...]:
        """The place of each page; all of them have one."""
        if len(self._numbers) != len(self.pages) or self._moves != self.slab.moves:
            self._numbers = tuple([page.number for page in self.pages if page.number is not None])
            self._moves = self.slab.moves
            assert len(self._numbers) == len(self.pages), "a page of this table is not on the device"
        return self._numbers

    def add(self, page: Page) -> None:
        """Map one more page, holding it."""
        page.slab.hold(page)
        self.pages.append(page)

    def replace(self, index: int, page: Page) -> Page:
        """Map `page`, which is held already, in place of another, whose reference passes to the caller."""
        before, self.pages[index] = self.pages[index], page
        self._numbers = ()
        return before

    def cut(self, index: int) -> list[Page]:
        """Unmap the pages from `index` on, last first. The references pass to the caller."""
        pages = self.pages[index:]
        del self.pages[index:], self.keys[index:]
        self._numbers = ()
        return pages[::-1]

    def shared(self, position: int) -> int | None:
        """The index of the page that holds `position`, if writing it would be seen by others."""
        index = position // self.slab.page_tokens
        if index < len(self.pages):
            page = self.pages[index]
            if page.references > 1 or page.cached:
                return index
        return None

    def shortage(self, position: int, end: int) -> int:
        """How many pages must be placed before [position, end) can be written."""
        new = -(-end // self.slab.page_tokens) - len(self.pages)
        return (new if new > 0 else 0) + (self.shared(position) is not None)

    @property
    def swapped(self) -> list[Page]:
        return [page for page in self.pages if page.number is None]
