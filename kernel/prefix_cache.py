"""Pages by what they hold: a prompt that begins like an earlier one of the same tenant finds its KV computed.

    root(model, tenant) ── key 0 ── key 1 ── key 2        key i = hash(key i-1, tokens of page i)
                           page     page     page ── tail (a last page that is not full)

A page's name is the hash of all tokens up to its end (as in vLLM), salted by tenant, so nobody learns by timing what
another tenant has asked. Pages that nobody holds are evicted in the order of GreedyDual-Size (Cao and Irani, USITS
1997): rent = inflation + uses * worth, worth being the seconds of computing that a byte saves. The deeper of two equal
pages goes first: without it, what is before it still serves. Knows no ledger: the pager frees what this forgets.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from heapq import heapify, heappop, heappush
from itertools import chain

from llm_os.kernel.slab import Page


def root_key(model: str, tenant: str) -> bytes:
    """Where the names of this tenant's pages of this model begin."""
    return _digest(f"{len(model)}:{model}{tenant}".encode(errors="surrogatepass"))


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page that follows the one named `before` and holds these tokens."""
    return _digest(before + array("q", tokens).tobytes())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class PrefixCache:
    """Finds pages by content, and says which of those that nobody holds should go first."""

    def __init__(self) -> None:
        self._full: dict[bytes, Page] = {}
        self._tails: dict[bytes, Page] = {}  # by the name of the page before
        self._inflation = 0.0
        self._serial = 0
        self._device: list[tuple[float, int, Page]] = []  # heaps of pages that nobody holds; entries may be out of date
        self._swapped: list[tuple[float, int, Page]] = []

    def __len__(self) -> int:
        return len(self._full) + len(self._tails)

    def __iter__(self) -> Iterator[Page]:
        return chain(self._full.values(), self._tails.values())

    def full(self, key: bytes) -> Page | None:
        return self._full.get(key)

    def tail(self, before: bytes) -> Page | None:
        """The last page, not full, that followed the page named `before`; `Page.tokens` says what it holds."""
        return self._tails.get(before)

    def insert(self, key: bytes, page: Page) -> None:
        """List a full page. Its name must be free."""
        assert key not in self._full and not page.cached
        self._full[key] = page
        page.key, page.tokens, page.cached = key, (), True

    def insert_tail(self, before: bytes, tokens: Sequence[int], page: Page) -> Page | None:
        """List a page that is not full. Returns the one that this displaces: the caller frees it if nobody holds it."""
        assert tokens and not page.cached
        displaced = self._tails.get(before)
        if displaced is not None:
            self.remove(displaced)
        self._tails[before] = page
        page.key, page.tokens, page.cached = before, tuple(tokens), True
        return displaced

    def remove(self, page: Page) -> None:
        """Forget a page; those that hold it keep it."""
        assert page.key is not None and page.cached
        del (self._tails if page.tokens else self._full)[page.key]
        page.key, page.tokens, page.cached = None, (), False
        self._tidy(self._device)
        self._tidy(self._swapped)

    def _tidy(self, heap: list[tuple[float, int, Page]]) -> None:
        """Drop what is out of date, once it is most of a heap."""
        if len(heap) > 64 + 4 * len(self):
            heap[:] = [entry for entry in heap if _resting(entry)]
            heapify(heap)

    def rest(self, page: Page) -> None:
        """Nobody holds it any more: it waits to be used again, or to be evicted."""
        page.rent = self._inflation + (1 + page.uses) * page.slab.worth
        self._serial += 1
        page.rested = self._serial
        heap = self._swapped if page.number is None else self._device
        heappush(heap, (page.rent, self._serial, page))
        self._tidy(heap)

    def ranked(self, swapped: bool = False) -> Generator[Page]:
        """Those that nobody holds, on the device (or in swap), the least worth first. Not while any of them changes."""
        heap = self._swapped if swapped else self._device
        seen = []
        try:
            while heap:
                entry = heappop(heap)
                if _resting(entry) and (entry[2].number is None) is swapped:
                    seen.append(entry)
                    if not entry[2].busy:
                        yield entry[2]
        finally:
            for entry in seen:
                heappush(heap, entry)

    def leaves(self, page: Page) -> None:
        """It is evicted, to be dropped or swapped: who is used from now on is worth more than it was."""
        self._inflation = max(self._inflation, page.rent)

    def evict_swapped(self) -> Page | None:
        """Forget the page of least rent of those in swap that nobody holds."""
        with closing(self.ranked(swapped=True)) as pages:
            found = next(pages, None)
        if found is not None:
            self.leaves(found)
            self.remove(found)
        return found

    def check(self) -> None:
        """Each page is listed once, under its own name."""
        most = 65 + 4 * len(self)
        assert len(self._device) <= most and len(self._swapped) <= most, "the order of eviction has no end"
        unheld: list[Page] = []
        for key, page in self._full.items():
            assert page.cached and page.key == key and not page.tokens
            if not page.references:
                unheld.append(page)
        for before, page in self._tails.items():
            assert page.cached and page.key == before and page.tokens
            if not page.references:
                unheld.append(page)
        if unheld:
            listed = {page for _, serial, page in self._device if page.rested == serial}
            listed.update([page for _, serial, page in self._swapped if page.rested == serial])
            assert listed.issuperset(unheld), "a cached page can never be evicted"


def _resting(entry: tuple[float, int, Page]) -> bool:
    _, serial, page = entry
    return page.cached and not page.references and page.rested == serial
