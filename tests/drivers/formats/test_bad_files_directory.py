"""Hostile safetensors directories: each JSON field and each header number replaced, files cut and flipped."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.formats.fields import Fields
from llm_os.drivers.formats.hf_architecture import hf_architecture
from llm_os.drivers.formats.image import open_image
from llm_os.drivers.formats.json_files import decode_object
from llm_os.drivers.formats.shapes import tensor_shapes
from llm_os.kernel.errors import Error, FormatError

NUMBERS = [0, 1, -1, 2**31, 2**63 - 1, 2**64, 1e400, 0.5]
STRANGE: list[Any] = [*NUMBERS, None, "x", "", [], {}, [[]], [1, "x"], {"x": None}, True, "\n\x1b[31m"]

EXTRA = (
    *("rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor", "query_pre_attn_scalar"),
    *("sliding_window", "layer_types", "max_window_layers", "sliding_window_pattern", "text_config"),
    *("quantization_config", "attention_bias", "hidden_act", "original_max_position_embeddings"),
)

Attempt = Callable[[], Error | None]


@pytest.fixture
def attempt(model_directory: Path) -> Iterator[Attempt]:
    """Opens the model and reads all of it; returns the Error that refused it, None when it is sound."""
    tracemalloc.start()

    def open_and_use() -> Error | None:
        size = sum(path.stat().st_size for path in model_directory.iterdir())
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            image = open_image(model_directory)
            for name, shape in tensor_shapes(image.hyperparameters).items():
                assert image.weights[name].float32().shape == shape
            image.encode("hello", raw=True)
            image.close()
            refused = None
        except Error as error:
            assert str(model_directory) in str(error)
            assert "\n" not in str(error)
            assert len(str(error)) < 600
            refused = error
        assert tracemalloc.get_traced_memory()[1] - before < 20 * size + 2_000_000
        return refused

    yield open_and_use
    tracemalloc.stop()


def test_the_model_is_sound_before_it_is_damaged(attempt: Attempt) -> None:
    assert attempt() is None


def test_any_field_of_the_config_may_be_anything(model_directory: Path, attempt: Attempt) -> None:
    path = model_directory / "config.json"
    config = json.loads(path.read_text())
    for field in [*config, "rope_parameters"]:
        for value in STRANGE:
            path.write_text(json.dumps(config | {field: value}))
            attempt()


def architecture(config: dict[str, Any]) -> Architecture | None:
    """What `config.json` with this content says; None when an Error refuses it."""
    try:
        return hf_architecture(
            Fields(decode_object(json.dumps(config).encode(), "config.json"), "config.json"), has_head=True
        )
    except Error as error:
        assert str(error).startswith("config.json: ")
        assert "\n" not in str(error)
        return None


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "longrope", "yarn"])
def test_any_field_of_a_rope_may_be_anything(model_directory: Path, kind: str, key: str) -> None:
    config = json.loads((model_directory / "config.json").read_text())
    rope = {
        "rope_type": kind,
        "rope_theta": 1e4,
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0] * 4,
        "attention_factor": 1.0,
        "partial_rotary_factor": 0.5,
    }
    assert (architecture(config | {key: rope | {"partial_rotary_factor": 1.0}}) is None) == (kind == "yarn")
    for field in rope:
        for value in [*STRANGE, [0.0] * 4, [1e400] * 4, [1.0, 1.0]]:
            found = architecture(config | {key: rope | {field: value}})
            if found is not None:
                numbers = [x for layer in found.layers for x in (layer.rope.base, *(layer.rope.factors or ()))]
                assert all(0 < number < math.inf for number in numbers)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text", "phi3"])
def test_any_field_of_any_family_may_be_anything(model_directory: Path, model_type: str) -> None:
    config = json.loads((model_directory / "config.json").read_text())
    config |= {"model_type": model_type, "use_sliding_window": True}
    assert architecture(config) is not None
    for field in (*config, *EXTRA):
        for value in [*STRANGE, ["full_attention", "x"], [None, None], {"full_attention": 1}]:
            found = architecture(config | {field: value})
            if found is not None:
                assert 0 < found.attention_scale < math.inf
                assert all(layer.window is None or layer.window > 0 for layer in found.layers)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_any_field_of_the_other_files_may_be_anything(model_directory: Path, attempt: Attempt, name: str) -> None:
    path = model_directory / name
    config = json.loads(path.read_text())
    for field in {*config, "do_sample", "top_p", "min_p", "repetition_penalty", "eos_token_id", "add_bos_token"}:
        for value in STRANGE:
            path.write_text(json.dumps(config | {field: value}))
            attempt()


def test_any_number_of_the_header_may_be_replaced(model_directory: Path, attempt: Attempt) -> None:
    path = model_directory / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    for name in ("lm_head.weight", "model.norm.weight"):
        for field in ("shape", "data_offsets", "dtype"):
            items = range(len(header[name][field])) if field != "dtype" else []
            for value in [*STRANGE, len(data), len(data) - 1, len(data) + 1]:
                for index in items:
                    changed = json.loads(json.dumps(header))
                    changed[name][field][index] = value
                    text = json.dumps(changed).encode()
                    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
                    if value != header[name][field][index]:
                        assert attempt() is not None
                changed = json.loads(json.dumps(header))
                changed[name][field] = value
                text = json.dumps(changed).encode()
                path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
                assert attempt() is not None


def test_a_file_cut_anywhere_is_refused(model_directory: Path, attempt: Attempt) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        path = model_directory / name
        data = path.read_bytes()
        for end in {*range(min(24, len(data))), *range(0, len(data), max(1, len(data) // 20)), len(data) - 1}:
            path.write_bytes(data[:end])
            assert isinstance(attempt(), FormatError), f"{name} cut at {end}"
        path.write_bytes(data)


def test_a_header_with_a_million_values_is_refused(model_directory: Path, attempt: Attempt) -> None:
    text = b'{"a":[' + b"0," * (2**20 + 1) + b"0]}"
    (model_directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "more than 1048576 JSON values" in str(attempt())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(["model.safetensors", "config.json", "generation_config.json", "tokenizer_config.json"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_flipped_bytes_are_survived(
    model_directory: Path, attempt: Attempt, name: str, flips: list[tuple[float, int]]
) -> None:
    path = model_directory / name
    sound = path.read_bytes()
    end = 8 + struct.unpack_from("<Q", sound)[0] if name == "model.safetensors" else len(sound)
    data = bytearray(sound)
    for place, byte in flips:
        data[int(place * end)] = byte
    path.write_bytes(data)
    try:
        attempt()
    finally:
        path.write_bytes(sound)
