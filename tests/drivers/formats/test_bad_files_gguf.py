"""Hostile GGUF files: cut anywhere, or with any number in the header replaced, a file opens sound or fails as an Error.

Each attempt is bounded in memory by a multiple of the file's size.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llm_os.drivers.formats.image import open_image
from llm_os.drivers.formats.shapes import tensor_shapes
from llm_os.kernel.errors import Error, FormatError

Field = tuple[str, int, str]  # what it is, where it lies, how struct writes it

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def walk(data: bytes) -> Iterator[Field]:
    """Every number in the header of a sound file. An independent reader, that trusts what it reads."""
    at = 4

    def number(what: str, code: str) -> Iterator[Field]:
        nonlocal at, last
        yield what, at, code
        (last,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(code)

    def text(what: str) -> Iterator[Field]:
        nonlocal at, string
        yield from number(f"length of {what}", "Q")
        string = data[at : at + last].decode()
        at += last

    last, string = 0, ""
    yield from number("version", "I")
    yield from number("tensor count", "Q")
    tensors = last
    yield from number("metadata count", "Q")
    for _ in range(last):
        yield from text("key")
        key = string
        yield from number(f"type of {key}", "I")
        kind = last
        if kind == ARRAY:
            yield from number(f"element type of {key}", "I")
            kind = last
            yield from number(f"count of {key}", "Q")
            for index in range(last):
                fields = text(f"{key}[{index}]") if kind == STRING else number(f"{key}[{index}]", SCALARS[kind])
                yield from (field for field in fields if index in (0, 5))  # the others are alike
        elif kind == STRING:
            yield from text(key)
        else:
            yield from number(key, SCALARS[kind])
    for _ in range(tensors):
        yield from text("tensor name")
        name = string
        yield from number(f"dimensions of {name}", "I")
        for index in range(last):
            yield from number(f"dimension {index} of {name}", "Q")
        yield from number(f"type of {name}", "I")
        yield from number(f"offset of {name}", "Q")
    yield "start of the data", -(-at // 32) * 32, ""


@pytest.fixture
def sound(write_gguf: Callable[..., Path]) -> bytes:
    rope = {"rope_freqs.weight": np.ones(4, np.float32)}
    return write_gguf(metadata={"general.alignment": 32, "llama.vocab_size": 261}, tensors=rope).read_bytes()


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Callable[[bytes], Error | None]]:
    """Opens a file with these bytes and reads all of it; returns the Error that refused it, None when it is sound."""
    path = tmp_path / "bad.gguf"
    tracemalloc.start()

    def open_and_use(data: bytes) -> Error | None:
        path.write_bytes(data)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            image = open_image(path)
            for name, shape in tensor_shapes(image.hyperparameters).items():
                assert image.weights[name].float32().shape == shape
            assert image.encode("hello", raw=True)
            image.close()
            refused = None
        except Error as error:
            message = str(error)
            assert "bad.gguf" in message
            assert "\n" not in message
            assert len(message) < 600
            refused = error
        assert tracemalloc.get_traced_memory()[1] - before < 100 * len(data) + 2_000_000
        return refused

    yield open_and_use
    tracemalloc.stop()


Attempt = Callable[[bytes], Error | None]


def test_the_model_is_sound_before_it_is_damaged(sound: bytes, attempt: Attempt) -> None:
    assert attempt(sound) is None


def test_a_file_cut_at_any_boundary_is_refused(sound: bytes, attempt: Attempt) -> None:
    boundaries = sorted({at for _, at, _ in walk(sound)} | set(range(64)) | set(range(0, len(sound), 997)))
    for end in boundaries:
        assert isinstance(attempt(sound[:end]), FormatError), f"cut at {end}"


def test_the_last_byte_of_the_last_tensor_is_needed(sound: bytes, attempt: Attempt) -> None:
    padding = len(sound) - len(sound.rstrip(b"\0"))
    refused = attempt(sound[: len(sound) - padding - 1])
    assert isinstance(refused, FormatError)
    assert "truncated" in str(refused)


def replaced(data: bytes, field: Field, value: int) -> bytes:
    """The file with one number replaced, as far as `value` fits its width."""
    _, at, code = field
    size = struct.calcsize(code)
    new = struct.pack(f"<{code}", value) if code in "fd" else (value % 256**size).to_bytes(size, "little")
    return data[:at] + new + data[at + size :]


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**63 - 1, "size - 1", "size", "size + 1"])
def test_any_number_in_the_header_may_be_replaced(sound: bytes, attempt: Attempt, value: int | str) -> None:
    number = value if isinstance(value, int) else len(sound) + {"size - 1": -1, "size": 0, "size + 1": 1}[value]
    fields = [field for field in walk(sound) if field[2]]
    refused = {field[0]: attempt(replaced(sound, field, number)) for field in fields}
    assert len(fields) > 200
    structural = [
        what for what in refused if what.startswith(("tensor count", "metadata count", "length of", "count of"))
    ]
    if number > 1:  # lengths of nothing and one may happen to leave a file that makes sense
        assert [what for what in structural if refused[what] is None] == []


HYPERPARAMETERS = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "head_count",
    "head_count_kv",
    "key_length",
)


@pytest.mark.parametrize("value", [0, 2**31, 2**32 - 1])
def test_sizes_that_the_tensors_do_not_have_are_refused_by_name(sound: bytes, attempt: Attempt, value: int) -> None:
    for field in walk(sound):
        if field[0].startswith("llama.") and field[0].endswith(HYPERPARAMETERS):
            assert field[0] in str(attempt(replaced(sound, field, value)))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8), st.booleans()
)
@example([(0.0, 0)], True)
def test_flipped_bytes_are_survived(
    sound: bytes, attempt: Attempt, flips: list[tuple[float, int]], in_header: bool
) -> None:
    end = max(at for _, at, _ in walk(sound)) if in_header else len(sound)
    data = bytearray(sound)
    for place, byte in flips:
        data[int(place * end)] = byte
    attempt(bytes(data))
