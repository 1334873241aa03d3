"""Reading safetensors directories: names, shards, and what is refused."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_os.drivers.formats.hf_weights import HfWeights
from llm_os.drivers.formats.safetensors import read_directory, read_file
from llm_os.drivers.formats.weights import WeightTensor
from llm_os.kernel.errors import Closed, FormatError, ModelNotFound, Unsupported

ONE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def shard(directory: Path, places: dict[str, Any]) -> Path:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_tensors_are_those_that_were_saved(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tensors = read_directory(tmp_path)
    assert tensors.keys() == ONE.keys()
    for name, expected in ONE.items():
        assert tensors[name].shape == expected.shape
        assert np.array_equal(tensors[name].float32(), expected)


def test_bfloat16_is_read(tmp_path: Path) -> None:
    data = np.array([1.5, -2.0], np.float32).view(np.uint16)[1::2].tobytes()
    path = raw(tmp_path / "x.safetensors", {"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, data)
    assert read_file(path)["a"].float32().tolist() == [1.5, -2.0]


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    save_file({"a": ONE["a"]}, tmp_path / "model-1.safetensors")
    save_file({"b": ONE["b"]}, tmp_path / "model-2.safetensors")
    tensors = read_directory(shard(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"}))
    assert np.array_equal(tensors["a"].float32(), ONE["a"])
    assert np.array_equal(tensors["b"].float32(), ONE["b"])


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/out.safetensors", "sub\\x.safetensors", "x.bin", "a\0.safetensors", 5, ["x"]]
)
def test_a_shard_outside_the_directory_is_refused(tmp_path: Path, name: object) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(ONE, tmp_path / "out.safetensors")
    with pytest.raises(FormatError, match="which is no name of a"):
        read_directory(shard(directory, {"a": name}))


def test_a_missing_shard_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "model-1.safetensors")
    with pytest.raises(ModelNotFound, match=r"model-2\.safetensors"):
        read_directory(shard(tmp_path, {"c": "model-2.safetensors"}))
    with pytest.raises(FormatError, match="tensor 'c' is missing"):
        read_directory(shard(tmp_path, {"c": "model-1.safetensors"}))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_recognised_and_never_loaded(tmp_path: Path, protocol: int) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"weight": Bomb()} if protocol % 2 else Bomb(), protocol))
    with pytest.raises(FormatError, match="a pickle, not safetensors; pickles can run code and are never loaded"):
        read_directory(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_pytorch_checkpoint_is_recognised(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(FormatError, match=r"zip archive .* never loaded"):
        read_directory(tmp_path)


def test_a_directory_of_pickles_is_told_to_convert(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FormatError, match=r"only pytorch_model\.bin; pickles .* convert it to safetensors"):
        read_directory(tmp_path)


def test_a_directory_without_weights_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_directory(tmp_path)


def info(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


REFUSED: dict[str, object] = {
    "no JSON header": b"xx",
    "not valid JSON": b"{]",
    "must be described by an object": {"a": 1},
    "dtype 'F99', which is none": info(dtype="F99"),
    "dtype \\['F32'\\], which is none": info(dtype=["F32"]),
    "has shape \\[\\]": info(shape=[]),
    "has shape \\[-2\\]": info(shape=[-2]),
    "has shape \\[0\\]": info(shape=[0]),
    "has shape 'x'": info(shape="x"),
    "has shape \\[2, True\\]": info(shape=[2, True]),
    "has shape \\[9": info(shape=[9] * 9),
    "has data_offsets \\[8, 0\\]": info(data_offsets=[8, 0]),
    "has data_offsets \\[-1, 7\\]": info(data_offsets=[-1, 7]),
    "has data_offsets \\[0, 9\\]": info(data_offsets=[0, 9]),
    "has data_offsets \\[0\\]": info(data_offsets=[0]),
    "has 8 bytes; its shape and dtype need 12": info(shape=[3]),
    "overlap": {**info(), "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
}


@pytest.mark.parametrize("problem", list(REFUSED))
def test_damage_is_named_in_one_line(tmp_path: Path, problem: str) -> None:
    path = raw(tmp_path / "x.safetensors", REFUSED[problem], bytes(8))
    with pytest.raises(FormatError, match=problem) as caught:
        read_file(path)
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63 - 1, 2**64 - 1, 1000])
def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(FormatError, match=f"header length is {length}"):
        read_file(raw(tmp_path / "x.safetensors", info(), bytes(8), length=length))


def test_another_dtype_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="tensor 'a' has dtype F8_E4M3"):
        read_file(raw(tmp_path / "x.safetensors", info(dtype="F8_E4M3", shape=[8]), bytes(8)))


def weights(*names: str, family: str = "llama") -> HfWeights:
    """Tensors of these names, each full of its index."""
    tensors = {}
    for index, name in enumerate(names):
        data = np.full((1, 4), index, np.float32).view(np.uint8)
        tensors[name] = WeightTensor(name=name, shape=(4,), kind="F32", data=data)
    return HfWeights(tensors, family, "model")


@pytest.mark.parametrize(
    ("hf", "known", "family"),
    [
        ("model.embed_tokens.weight", "token_embd.weight", "llama"),
        ("lm_head.weight", "output.weight", "llama"),
        ("model.norm.weight", "output_norm.weight", "llama"),
        ("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias", "qwen2"),
        ("model.layers.0.self_attn.k_norm.weight", "blk.0.attn_k_norm.weight", "qwen3"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight", "llama"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight", "gemma3"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "blk.0.ffn_norm.weight", "gemma3"),
        ("model.layers.0.post_feedforward_layernorm.weight", "blk.0.post_ffw_norm.weight", "gemma3"),
        ("language_model.model.layers.3.mlp.up_proj.weight", "blk.3.ffn_up.weight", "gemma3"),
        ("model.language_model.embed_tokens.weight", "token_embd.weight", "gemma3"),
        ("language_model.lm_head.weight", "output.weight", "gemma3"),
        ("model.layers.0.self_attn.qkv_proj.weight", "blk.0.attn_qkv.weight", "phi3"),
        ("model.layers.0.mlp.gate_up_proj.weight", "blk.0.ffn_up.weight", "phi3"),
        ("model.layers.0.strange.weight", "model.layers.0.strange.weight", "llama"),
    ],
)
def test_names_are_ggufs(hf: str, known: str, family: str) -> None:
    assert weights(hf, family=family).names() == (known,)


def test_what_a_decoder_does_not_need_is_left_out() -> None:
    found = weights("vision_tower.x.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.norm.weight")
    assert found.names() == ("output_norm.weight",)


def test_gemmas_norms_come_back_ready_to_multiply() -> None:
    names = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.self_attn.q_norm.weight")
    found = weights(*names, family="gemma3")
    assert found["blk.0.ffn_up.weight"].float32().tolist() == [0.0] * 4
    assert found["output_norm.weight"].float32().tolist() == [2.0] * 4
    assert found["blk.0.attn_q_norm.weight"].float32().tolist() == [3.0] * 4
    assert weights(*names)["output_norm.weight"].float32().tolist() == [1.0] * 4


def test_two_tensors_with_one_meaning_are_refused() -> None:
    with pytest.raises(FormatError, match="are the same"):
        weights("model.norm.weight", "language_model.model.norm.weight", family="gemma3")


def test_a_missing_tensor_and_closed_weights_say_so() -> None:
    found = weights("model.norm.weight")
    with pytest.raises(FormatError, match=r"model: tensor output\.weight is missing"):
        found["output.weight"]
    found.close()
    with pytest.raises(Closed):
        found.names()
