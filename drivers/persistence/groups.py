"""The journal's file format: a header, then groups of records, each with its length and a checksum. No files here but
the one to read; which groups there are, and when they are durable, is the log's business.

    header  magic "llm-osJ\\n" │ version u32 │ generation u64 │ greatest pid u64 │ crc u32
    group   length u32 │ crc u32 │ msgpack array of records
    …

Little-endian. The crc of a group goes on from the one before it, the first one from the header's: bytes of an earlier
file, or of a group that was given up, never pass for the next one.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from llm_os.drivers.persistence.files import File, read_all
from llm_os.kernel.errors import StoreError
from llm_os.kernel.journal import Began, Record

VERSION = 1
_MAGIC = b"llm-osJ\n"
_HEADER = struct.Struct("<8sIQQI")
_GROUP = struct.Struct("<II")
_CHUNK = 2**20
_WAY_OUT = "move it away to start without its sessions"

_encode = msgspec.msgpack.Encoder().encode
_records = msgspec.msgpack.Decoder(list[Record])
_began = msgspec.msgpack.Decoder(Began)


class Header(NamedTuple):
    generation: int  # of files in this place, from 1
    last_pid: int  # the greatest pid of earlier generations

    def pack(self) -> bytes:
        head = _HEADER.pack(_MAGIC, VERSION, *self, 0)[:-4]
        return head + zlib.crc32(head).to_bytes(4, "little")


class Group(NamedTuple):
    records: list[Record]
    end: int  # offset of what follows it
    crc: int


def pack_record(record: Record) -> bytes:
    """Raises StoreError for what could not be read back: a request may hold anything."""
    try:
        packed = _encode(record)
        if isinstance(record, Began):
            _began.decode(packed)
    except Exception as error:  # of msgspec, of the fields' own checks, too deep, no text
        raise StoreError(f"process {record.pid} cannot be journaled: {error}") from error
    return packed


def pack_group(crc: int, records: Sequence[bytes | bytearray], count: int) -> tuple[bytes, int]:
    """A group of `count` packed records that follows one with that crc, and its own crc.

    Raises StoreError if it has 4 GiB or more."""
    size = 5 + sum(map(len, records))
    if size >= 2**32:
        raise StoreError(f"{count} records for the journal have {size} bytes; a group must have less than 4 GiB")
    payload = b"".join((b"\xdd", count.to_bytes(4, "big"), *records))
    crc = _checksum(payload, crc)
    return _GROUP.pack(size, crc) + payload, crc


def read_header(name: str, file: File) -> tuple[Header, int, int]:
    """The header, where the first group begins, and the crc before it.

    Raises StoreError for a file that is no journal, is damaged there, or is of a later version.
    """
    data = read_all(file, 0, _HEADER.size)
    if data[: len(_MAGIC)] != _MAGIC[: len(data)] or not data:
        raise StoreError(f"{name} is no journal of llm-os; {_WAY_OUT}")
    version = int.from_bytes(data[8:12], "little")
    if len(data) >= 12 and version > VERSION:
        raise StoreError(
            f"{name} has version {version}, and this llm-os reads {VERSION}; use a newer one, or {_WAY_OUT}"
        )
    if len(data) < _HEADER.size or Header(*_HEADER.unpack(data)[2:4]).pack() != data:
        raise StoreError(f"{name} is damaged in its first {_HEADER.size} bytes; {_WAY_OUT}")
    return Header(*_HEADER.unpack(data)[2:4]), _HEADER.size, int.from_bytes(data[-4:], "little")


def read_groups(name: str, file: File, offset: int, crc: int) -> Iterator[Group]:
    """Up to the end, or to the first group that is not whole.

    Raises StoreError for a group that was written as it stands, but not by this version.
    """
    size, base, buffer = file.size(), 0, b""

    def take(start: int, count: int) -> bytes:
        nonlocal base, buffer
        if not base <= start <= start + count <= base + len(buffer):
            base, buffer = start, read_all(file, start, min(max(count, _CHUNK), size - start))
        return buffer[start - base : start - base + count]

    while size - offset >= _GROUP.size:
        length, expected = _GROUP.unpack(take(offset, _GROUP.size))
        start = offset + _GROUP.size
        payload = take(start, length)  # at most what there is
        crc = _checksum(payload, crc)
        if crc != expected or len(payload) < length:
            return
        try:
            records = _records.decode(payload)
        except Exception as error:
            raise StoreError(f"{name} has records of another version at byte {offset} ({error}); {_WAY_OUT}") from error
        offset = start + length
        yield Group(records, offset, crc)


def _checksum(payload: bytes, before: int) -> int:
    return zlib.crc32(payload, zlib.crc32(len(payload).to_bytes(4, "little"), before))
