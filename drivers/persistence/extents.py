"""Which bytes of a file are taken. Arithmetic only; the file is somebody else's."""

from __future__ import annotations

from bisect import bisect_left, insort

BLOCK = 4096  # a write that covers whole blocks never has to read them first


def rounded(size: int) -> int:
    return max(1, -(-size // BLOCK)) * BLOCK


class Extents:
    """Hands out runs of whole blocks, the lowest that fits first, and joins what is given back with its neighbours, so
    that sizes of one model do not stay reserved when another one comes. `end` is where the last one that is taken ends.
    """

    def __init__(self) -> None:
        self.end = 0
        self._free: list[tuple[int, int]] = []  # (offset, size), in order, never adjacent, none at the end

    def take(self, size: int) -> int:
        """The offset of `size` bytes, rounded up to blocks."""
        size = rounded(size)
        for index, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[index : index + 1] = [(offset + size, free - size)] if free > size else []
                return offset
        offset, self.end = self.end, self.end + size
        return offset

    def give(self, offset: int, size: int) -> None:
        """Back, with the size that it was taken with."""
        size = rounded(size)
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == offset + size:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            offset, before = self._free.pop(index - 1)
            size += before
        if offset + size == self.end:
            self.end = offset
        else:
            insort(self._free, (offset, size))

    def check(self, taken: list[tuple[int, int]]) -> None:
        """Raises AssertionError unless exactly these (offset, size) are out, and everything below `end` is one or the
        other."""
        runs = sorted([*self._free, *((offset, rounded(size)) for offset, size in taken)])
        place = 0
        for offset, size in runs:
            assert offset == place and size > 0, f"bytes {place} to {offset} are nobody's, or somebody's twice"
            place = offset + size
        assert place == self.end, f"the last run ends at {place}, not {self.end}"
        assert not self._free or sum(self._free[-1]) < self.end, "the end is free"
