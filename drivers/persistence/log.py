"""The journal in a folder: an append-only file that is written anew when most of it is about processes that have ended.

    append    write a group at the end ── fdatasync ── acknowledged
    rewrite   live sessions ──> journal.new ── fdatasync ── rename to journal ── fsync of the folder

A rewrite happens at opening, when the file has grown to several times what is live in it, and when an append failed in
a way that leaves the file in doubt. At any moment the file named journal is complete. Knows nothing of what a record
means, but that a session lasts from Began to Done.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llm_os.drivers.persistence.files import File, Files, LocalFiles, read_all, write_all
from llm_os.drivers.persistence.groups import Header, pack_group, pack_record, read_groups, read_header
from llm_os.kernel.errors import StoreError
from llm_os.kernel.journal import Began, Done, Record, Session, replay

_ASIDE = 4  # files of what was cut off, at most
_ASIDE_BYTES = 64 * 2**20  # of each
_PIECE = 2**20


class _Live:
    """The packed records of a process that has not ended."""

    __slots__ = ("count", "packed")

    def __init__(self) -> None:
        self.count, self.packed = 0, bytearray()

    def add(self, packed: bytes) -> None:
        self.count += 1
        self.packed += packed


class FileLog:
    """A kernel.journal.Log in `folder`, which it makes, and locks: one writer. May be called from any thread, one after
    the other.

    Raises StoreError if another process has the folder, if the file is no journal or of a later version, and if the
    disk fails; what was there stays as it was. A file of a process that died is continued: a group that is not whole
    ends it, and `lost_bytes` says how much was cut off (less than a group after a crash; more if the disk is damaged).
    That is kept beside it, up to 64 MiB, in one of four files that take turns, and `warning` says so.
    """

    sessions: dict[int, Session]  # what had not ended when the log was opened; whoever takes it may empty it
    last_pid: int  # the greatest pid that was ever in the journal, 0 for none
    lost_bytes: int
    warning: str  # for whoever runs this: what was not as it should be when the log was opened; "" if all was well

    def __init__(self, folder: Path, files: Files | None = None, compact_above: int = 2**20) -> None:
        """`compact_above`: a file of so many bytes or fewer is not rewritten while it is open."""
        self._files = files or LocalFiles()
        self._folder, self._path, self._new = folder, folder / "journal", folder / "journal.new"
        self._compact_above = self._next_try = compact_above
        self._turn = threading.Lock()
        self._file: File | None = None
        self._sound = False  # the file at hand ends with the last acknowledged group, durably
        self._generation = self._size = self._crc = 0
        self._live: dict[int, _Live] = {}
        self._live_size = 0
        try:
            self._files.make_folder(folder)
            self._unlock = self._files.lock(folder / "lock")
        except BlockingIOError as held:
            raise StoreError(
                f"the state directory {folder} is in use by {held.strerror}; end that, or give another directory"
            ) from None
        except (FileExistsError, NotADirectoryError) as file:
            raise StoreError(
                f"the state directory {folder} cannot be: {file.filename} is a file; move it, or give another directory"
            ) from None
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._load()
            self._rewrite()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise self._failed(error) from error
            raise

    def append(self, records: Sequence[Record]) -> None:
        """One write and one fdatasync, whatever the number of records. After a StoreError they are not in the log.

        Only where the disk refuses even to take them back, a crash before the next append that succeeds may leave them
        there; until then every append raises.
        """
        if not records:
            return
        packed = [pack_record(record) for record in records]
        with self._turn:
            if self._file is None:
                raise StoreError(f"the journal in {self._folder} is closed")
            try:
                if not self._sound:
                    self._rewrite()
                self._write(*pack_group(self._crc, packed, len(packed)))
            except OSError as error:
                raise self._failed(error) from error
            for record, data in zip(records, packed, strict=True):
                self._apply(record, data)
            if self._size > max(self._next_try, 4 * self._live_size):
                self._next_try = 2 * self._size  # unless this succeeds
                with suppress(OSError, StoreError):  # the records are durable all the same
                    self._rewrite()

    def close(self) -> None:
        """Idempotent. Everything acknowledged is durable already."""
        with self._turn:
            self._close()

    def _load(self) -> None:
        name, self.last_pid, self.lost_bytes, self.warning = str(self._path), 0, 0, ""
        try:
            file = self._files.open(self._path)
        except FileNotFoundError:
            self.sessions = {}
            return
        try:
            header, end, crc = read_header(name, file)
            self._generation, self.last_pid = header
            records: list[Record] = []
            for group in read_groups(name, file, end, crc):
                records += group.records
                end = group.end
            self.lost_bytes = file.size() - end
            if self.lost_bytes:
                self._keep_aside(file, end)
        finally:
            with suppress(OSError):
                file.close()
        self.sessions = replay(records)
        self.last_pid = max([self.last_pid, *(record.pid for record in records)])
        for session in self.sessions.values():
            for record in session.records:
                self._apply(record, pack_record(record))

    def _keep_aside(self, file: File, start: int) -> None:
        """What is cut off would be gone with the next rewrite: somebody may be able to read it."""
        path = self._folder / f"journal.damaged-{self._generation % _ASIDE}"
        size = min(self.lost_bytes, _ASIDE_BYTES)
        aside = self._files.create(path)
        try:
            for offset in range(0, size, _PIECE):
                write_all(aside, offset, read_all(file, start + offset, min(_PIECE, size - offset)))
            aside.sync()
        finally:
            with suppress(OSError):
                aside.close()
        self.warning = (
            f"{self.lost_bytes} bytes at the end of {self._path} are no whole records, as after a loss of power or on "
            f"a damaged disk; sessions go on from what is before them, and {size} of the bytes are kept in {path}: "
            "look after the disk, and delete that file when you need it no more"
        )

    def _apply(self, record: Record, packed: bytes) -> None:
        pid = record.pid
        self.last_pid = max(self.last_pid, pid)
        if isinstance(record, Began | Done) and (ended := self._live.pop(pid, None)):
            self._live_size -= len(ended.packed)
        if isinstance(record, Began):
            self._live[pid] = _Live()
        if live := self._live.get(pid):
            live.add(packed)
            self._live_size += len(packed)

    def _write(self, group: bytes, crc: int) -> None:
        """Raises OSError; the file then ends where it did, if it is sound."""
        assert self._file is not None
        self._sound = False
        try:
            write_all(self._file, self._size, group)
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._size)
                self._file.sync()
                self._sound = True
            raise
        try:
            self._file.sync()
        except OSError:
            with suppress(OSError):  # what this file has on the disk cannot be known any more
                self._rewrite()
            raise
        self._size, self._crc, self._sound = self._size + len(group), crc, True

    def _rewrite(self) -> None:
        """Go on in a new file with what is live. Raises OSError; until the rename the old file is as it was."""
        self._generation += 1
        header = Header(self._generation, self.last_pid).pack()
        parts, crc = [header], int.from_bytes(header[-4:], "little")
        for live in self._live.values():
            group, crc = pack_group(crc, [live.packed], live.count)
            parts.append(group)
        image = b"".join(parts)
        file = self._files.create(self._new)
        try:
            write_all(file, 0, image)
            file.sync()
        except OSError:
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                self._files.remove(self._new)
            raise
        self._sound = False  # from here on nobody knows which file a crash would leave: both are complete
        old, self._file = self._file, file
        if old is not None:
            with suppress(OSError):
                old.close()
        self._files.rename(self._new, self._path)
        self._files.sync_folder(self._folder)
        self._size, self._crc, self._sound = len(image), crc, True
        self._next_try = self._compact_above

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file = None
        self._live.clear()
        self._unlock()
        self._unlock = lambda: None

    def _failed(self, error: OSError) -> StoreError:
        why = error.strerror or str(error)
        return StoreError(f"the journal in {self._folder} failed: {why}; mend the disk, or give another directory")
