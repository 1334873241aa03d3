"""Reading GGUF: what is in the file comes out, and the mapping goes when it should."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from llm_os.drivers.formats import gguf as reader
from llm_os.drivers.formats.gguf import GgufFile
from llm_os.kernel.errors import Closed, FormatError, ModelNotFound, Unsupported

WriteGguf = Callable[..., Path]


def kv(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def header(*pairs: bytes, version: int = 3, tensors: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, len(pairs)) + b"".join(pairs) + tensors


def tensor(name: str, dimensions: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    info = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dimensions))
    return info + struct.pack(f"<{len(dimensions)}Q", *dimensions) + struct.pack("<IQ", kind, offset)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GgufFile]:
    def write_and_open(data: bytes) -> GgufFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return GgufFile(path)

    return write_and_open


Opened = Callable[[bytes], GgufFile]


def test_metadata_and_tensors_are_those_of_gguf_py(write_gguf: WriteGguf) -> None:
    path = write_gguf(metadata={"a.list": [1, -2, 3], "a.floats": [0.5, 1.5], "a.flags": [True, False]})
    file, oracle = GgufFile(path), gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == expected
    assert file.names() == tuple(tensor.name for tensor in oracle.tensors)
    for known in oracle.tensors:
        found = file[known.name]
        assert (found.kind, found.shape) == (known.tensor_type.name, tuple(int(n) for n in reversed(known.shape)))
        assert found.data.tobytes() == known.data.tobytes()


def test_a_real_model_is_read_whole(smollm2: Path) -> None:
    file = GgufFile(smollm2)
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert len(file.names()) == 272
    embedding = file["token_embd.weight"]
    assert (embedding.kind, embedding.shape) == ("Q8_0", (49152, 576))
    end = max(file[name].data.ctypes.data + file[name].data.nbytes for name in file.names())
    start = min(file[name].data.ctypes.data for name in file.names())
    assert end - start <= smollm2.stat().st_size


@pytest.mark.parametrize("version", [2, 3])
def test_every_type_of_value_is_read(opened: Opened, version: int) -> None:
    pairs = [
        kv("u8", 0, struct.pack("<B", 255)),
        kv("i8", 1, struct.pack("<b", -1)),
        kv("u16", 2, struct.pack("<H", 65535)),
        kv("i16", 3, struct.pack("<h", -2)),
        kv("u32", 4, struct.pack("<I", 2**32 - 1)),
        kv("i32", 5, struct.pack("<i", -3)),
        kv("f32", 6, struct.pack("<f", 0.5)),
        kv("bool", 7, b"\x02"),
        kv("string", 8, struct.pack("<Q", 2) + "é".encode()),
        kv("nested", 9, struct.pack("<IQ", 9, 2) + struct.pack("<IQH", 2, 1, 7) + struct.pack("<IQ", 8, 0)),
        kv("u64", 10, struct.pack("<Q", 2**64 - 1)),
        kv("i64", 11, struct.pack("<q", -4)),
        kv("f64", 12, struct.pack("<d", 1e300)),
    ]
    expected = [255, -1, 65535, -2, 2**32 - 1, -3, 0.5, True, "é", [[7], []], 2**64 - 1, -4, 1e300]
    assert list(opened(header(*pairs, version=version)).metadata.values()) == expected


def test_tokens_that_are_not_utf8_keep_their_bytes(opened: Opened) -> None:
    strings = struct.pack("<IQQ", 8, 1, 2) + b"\xff\xfe"
    tokens = opened(header(kv("tokens", 9, strings))).metadata["tokens"]
    assert tokens[0].encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_the_file_is_unmapped_when_it_is_closed_and_the_last_view_is_gone(write_gguf: WriteGguf) -> None:
    path = write_gguf(name="to-be-unmapped.gguf")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list mappings")
    file = GgufFile(path)
    view = file["output_norm.weight"]
    file.close()
    file.close()
    assert path.name in maps.read_text()
    assert np.isfinite(view.float32()).all()
    del view
    assert path.name not in maps.read_text()


def test_a_closed_file_says_so(write_gguf: WriteGguf) -> None:
    file = GgufFile(write_gguf())
    file.close()
    with pytest.raises(Closed, match=r"tiny\.gguf"):
        file["output_norm.weight"]


def test_views_cannot_change_the_file(write_gguf: WriteGguf) -> None:
    with pytest.raises(ValueError, match="read-only"):
        GgufFile(write_gguf())["output_norm.weight"].data[0, 0] = 1


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="No such file"):
        GgufFile(tmp_path / "none.gguf")


DEEP = b"".join(struct.pack("<IQ", 9, 1) for _ in range(6))
REFUSED = {
    "not a GGUF file": b"GGML" + bytes(20),
    "ends at byte 6, within version": b"GGUF\x03\x00",
    "is not valid UTF-8": header(kv("key", 8, struct.pack("<Q", 2) + b"\xff\xfe")),
    "appears twice": header(kv("a", 0, b"\1"), kv("a", 0, b"\1")),
    "has value type 13": header(kv("a", 13, bytes(8))),
    "nested more than 4 deep": header(kv("a", 9, DEEP)),
    "string 1 of metadata 'a' has 4611686018427387904 bytes": header(
        kv("a", 9, struct.pack("<IQQ", 8, 2, 0) + struct.pack("<Q", 2**62))
    ),
    "length of metadata 'a' is 4194305; the limit is 4194304": header(kv("a", 9, struct.pack("<IQ", 0, 2**22 + 1))),
    "which needs 8000 bytes; 8 are left": header(kv("a", 9, struct.pack("<IQQ", 8, 1000, 0))),
    "tensor count is 65537": header(count=65537),
    "metadata count is 9": b"GGUF" + struct.pack("<IQQ", 3, 0, 9) + bytes(20),
    "tensor 't' appears twice": header(tensors=tensor("t", (1,)) + tensor("t", (1,)) + bytes(99), count=2),
    "has 5 dimensions": header(tensors=tensor("t", (1, 1, 1, 1, 1)), count=1),
    "dimension of 0": header(tensors=tensor("t", (4, 0)), count=1),
    "type number 4, which is none": header(tensors=tensor("t", (32,), kind=4), count=1),
    "no multiple of Q4_0's 32": header(tensors=tensor("t", (33,), kind=2), count=1),
    "no multiple of the alignment 32": header(tensors=tensor("t", (1,), offset=4) + bytes(99), count=1),
    "overlap": header(tensors=tensor("t", (9,)) + tensor("u", (8,), offset=32) + bytes(99), count=2),
    "truncated or damaged": header(tensors=tensor("t", (2**62, 4, 4)) + bytes(99), count=1),
    "general.alignment is 0": header(kv("general.alignment", 4, bytes(4))),
    "general.alignment is 48": header(kv("general.alignment", 4, struct.pack("<I", 48))),
    "general.alignment is 1048576": header(kv("general.alignment", 4, struct.pack("<I", 1 << 20))),
    "general.alignment is 'x'": header(kv("general.alignment", 8, struct.pack("<Q", 1) + b"x")),
}


@pytest.mark.parametrize("problem", list(REFUSED))
def test_damage_is_named_in_one_line(opened: Opened, problem: str) -> None:
    with pytest.raises(FormatError, match=problem) as caught:
        opened(REFUSED[problem])
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


UNSUPPORTED = {
    "GGUF version 1 is not supported; supported are 2 and 3": header(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "tensor 't' has type IQ4_XS": header(tensors=tensor("t", (256,), kind=23), count=1),
}


@pytest.mark.parametrize("problem", list(UNSUPPORTED))
def test_what_this_version_does_not_read_is_unsupported(opened: Opened, problem: str) -> None:
    with pytest.raises(Unsupported, match=problem):
        opened(UNSUPPORTED[problem])


def test_a_header_that_exceeds_the_limit_is_refused(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_HEADER", 64)
    with pytest.raises(FormatError, match="exceeds 64 bytes"):
        opened(header(kv("a", 8, struct.pack("<Q", 100) + bytes(100))))


def test_the_limit_on_elements_holds_for_all_arrays_together(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_ELEMENTS", 5)
    strings = struct.pack("<IQ", 8, 3) + bytes(24)
    numbers = struct.pack("<IQ", 0, 3) + bytes(3)
    assert opened(header(kv("a", 9, strings))).metadata["a"] == ["", "", ""]
    for pairs in ([strings, strings], [numbers, strings], [strings, numbers]):
        with pytest.raises(FormatError, match="length of metadata 'b' is 3; the limit is 2"):
            opened(header(*(kv(key, 9, value) for key, value in zip("ab", pairs, strict=True))))


def test_a_directory_and_an_empty_file_are_no_models(tmp_path: Path, opened: Opened) -> None:
    with pytest.raises(FormatError, match="not a regular file"):
        GgufFile(tmp_path)
    with pytest.raises(FormatError, match="empty"):
        opened(b"")
