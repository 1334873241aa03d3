"""Tokenizers of safetensors directories: the same ids as from GGUF, and what damaged files say."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llm_os.drivers.formats.gguf import GgufFile
from llm_os.drivers.formats.json_files import decode_object
from llm_os.drivers.formats.tokenizer import tokenizer_from_directory, tokenizer_from_gguf
from llm_os.drivers.formats.tokenizer_json import MAX_TOKENIZER, MAX_VALUES
from llm_os.kernel.errors import Error, FormatError, Unsupported

CASES = json.loads((Path(__file__).parents[2] / "data" / "smollm2_tokens.json").read_text(encoding="utf-8"))["cases"]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def write(directory: Path, name: str, content: Any) -> None:
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]], specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    return tokenizer


@pytest.fixture
def small(tmp_path: Path) -> Path:
    vocabulary = {text: token for token, text in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "he"])}
    tokenizer = byte_level(vocabulary, [("h", "e")], ["<|begin|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def change(directory: Path, **fields: Any) -> None:
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    write(directory, "tokenizer.json", content | fields)


def test_a_directory_gives_the_ids_of_the_gguf_file(smollm2: Path, tmp_path: Path) -> None:
    file = GgufFile(smollm2)
    file.close()
    tokens, merges = (file.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges"))
    kinds = file.metadata["tokenizer.ggml.token_type"]
    specials = [text for text, kind in zip(tokens, kinds, strict=True) if kind == 3]
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    byte_level({text: i for i, text in enumerate(tokens)}, pairs, specials).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}})
    directory, gguf = tokenizer_from_directory(tmp_path), tokenizer_from_gguf(file.metadata, "x.gguf")
    for case in CASES:
        if not any(ord(character) < 32 and character not in "\t\r\n" for character in case["text"]):
            assert directory.encode(case["text"], raw=True) == case["plain"]  # bytes without a token differ
            assert directory.encode(case["text"], raw=False) == case["special"]
    assert (directory.bos, directory.eos, directory.vocab_size) == (gguf.bos, gguf.eos, gguf.vocab_size)
    assert directory.turn_end_tokens(None) == gguf.turn_end_tokens(None)
    assert directory.text_end_tokens("<|im_end|>") == gguf.text_end_tokens("<|im_end|>") == {0}


def test_ends_come_from_all_three_files(small: Path) -> None:
    write(small, "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    write(small, "generation_config.json", {"eos_token_id": [3, 258]})
    tokenizer = tokenizer_from_directory(small)
    assert tokenizer.eos == "<|im_end|>"
    assert tokenizer.turn_end_tokens(None) == {3, 258, 259}


def test_the_post_processor_decides_about_the_beginning_unless_the_config_does(small: Path) -> None:
    write(small, "tokenizer_config.json", {"bos_token": "<|begin|>"})
    assert tokenizer_from_directory(small).encode("he", raw=True) == [256]
    tokenizer = Tokenizer.from_file(str(small / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 257)])
    tokenizer.save(str(small / "tokenizer.json"))
    loaded = tokenizer_from_directory(small)
    assert loaded.encode("he", raw=True) == [257, 256]
    assert loaded.encode("<|begin|>he", raw=False) == [257, 256]
    assert loaded.encode("<|begin|>", raw=True).count(257) == 1
    write(small, "tokenizer_config.json", {"bos_token": "<|begin|>", "add_bos_token": False})
    assert tokenizer_from_directory(small).encode("he", raw=True) == [256]


def test_a_sentencepiece_tokenizer_comes_back_as_text(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "he", "▁he"]
    model = models.BPE(
        vocab={text: token for token, text in enumerate(tokens)},
        merges=[("h", "e"), ("▁", "he")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    loaded = tokenizer_from_directory(tmp_path)
    ids = loaded.encode("he é😀 he", raw=True)
    assert ids[:2] == [1, tokens.index("▁he")]
    decoder = loaded.decoder()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == "he é😀 he"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"model": 7}', "\udcff"])
def test_files_that_are_no_tokenizer_are_named(content: str, small: Path) -> None:
    (small / "tokenizer.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(FormatError, match=r"tokenizer\.json[^\n]+$"):
        tokenizer_from_directory(small)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json is missing"):
        tokenizer_from_directory(tmp_path)


FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no FIFOs")
@pytest.mark.parametrize("name", FILES)
def test_a_fifo_in_place_of_a_file_blocks_nothing(name: str, small: Path) -> None:
    (small / name).unlink(missing_ok=True)
    os.mkfifo(small / name)
    with pytest.raises(FormatError, match=rf"{re.escape(name)}: not a regular file$"):
        tokenizer_from_directory(small)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="the system has no /dev/zero")
@pytest.mark.parametrize("name", FILES)
def test_an_endless_device_in_place_of_a_file_is_not_read(name: str, small: Path) -> None:
    (small / name).unlink(missing_ok=True)
    (small / name).symlink_to("/dev/zero")
    with pytest.raises(FormatError, match=rf"{re.escape(name)}: not a regular file$"):
        tokenizer_from_directory(small)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("values", ["[],", "0,", "[" * 500 + "]" * 500 + ","])
def test_a_file_of_very_many_small_values_is_refused_unparsed(values: str, name: str, small: Path) -> None:
    (small / name).write_text('{"x":[' + values * (2**22 // values.count(values[0])) + "0]}", encoding="utf-8")
    with pytest.raises(FormatError, match=rf"{re.escape(name)}: has more than \d+ JSON values$"):
        tokenizer_from_directory(small)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("values", ["{},", '{"":' * 100 + "0" + "}" * 100 + ","])
def test_a_file_of_very_many_objects_is_refused_unparsed(values: str, name: str, small: Path) -> None:
    (small / name).write_text('{"x":[' + values * (2**19 // values.count("{")) + "0]}", encoding="utf-8")
    with pytest.raises(FormatError, match=rf"{re.escape(name)}: has more than \d+ JSON (objects|values)$"):
        tokenizer_from_directory(small)


def test_a_tokenizer_of_too_many_bytes_is_not_read(small: Path) -> None:
    os.truncate(small / "tokenizer.json", 2**30)
    with pytest.raises(FormatError, match=r"tokenizer\.json: has 1073741824 bytes; the limit is 67108864$"):
        tokenizer_from_directory(small)


def test_as_many_tokens_and_merges_as_gemma3_has_are_within_the_limits() -> None:
    vocabulary = {f"token {token}": token for token in range(262_144)}
    merges = [[f"left {merge}", f"right {merge}"] for merge in range(514_906)]
    added = [{"id": token, "content": f"<unused{token}>", "special": True} | FLAGS for token in range(6_415)]
    content = {"added_tokens": added, "model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}
    data = json.dumps(content, indent=2).encode()
    assert len(data) < MAX_TOKENIZER
    assert decode_object(data, "tokenizer.json", MAX_VALUES) == content


@pytest.mark.parametrize("name", FILES[1:])
def test_a_damaged_file_beside_it_is_named(name: str, small: Path) -> None:
    (small / name).write_text("{", encoding="utf-8")
    with pytest.raises(FormatError, match=re.escape(name)):
        tokenizer_from_directory(small)


@pytest.mark.parametrize("ends", ["2", {"a": 1}, ["2"], [-1], 1.5, True, [[1]]])
def test_ends_that_are_no_ids_are_refused(ends: Any, small: Path) -> None:
    write(small, "generation_config.json", {"eos_token_id": ends})
    with pytest.raises(FormatError, match="eos_token_id"):
        tokenizer_from_directory(small)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {"a": -1}, "merges": []},
        {"type": "BPE", "vocab": {"a": 2**31}, "merges": []},
        {"type": "BPE", "vocab": {"a": "0"}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]},
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "BPE", "vocab": 7, "merges": []},
        {"type": "BPE", "merges": []},
        {"type": "Unigram", "vocab": [[]]},
        {"type": "Unigram", "vocab": [[["a"], 0.0]]},
        {"type": "BPE", "vocab": {"a": [0]}, "merges": []},
        {"type": "BPE", "vocab": {"a": {}}, "merges": []},
        {"type": "BPE", "vocab": {"a": True}, "merges": []},
    ],
)
def test_damaged_vocabularies_are_refused(model: Any, small: Path) -> None:
    change(small, model=model, added_tokens=[])
    with pytest.raises(FormatError, match=r"tokenizer\.json: [^\n]+$"):
        tokenizer_from_directory(small)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"added_tokens": [{"id": [1]}]}, r"added_tokens gives the id \[1\] to None"),
        ({"added_tokens": [{"id": {}, "content": "a"}]}, r"added_tokens gives the id \{\} to 'a'"),
        ({"added_tokens": [{"id": "1\n", "content": "a"}]}, r"added_tokens gives the id '1\\n' to 'a'"),
        ({"model": {"type": "BPE", "vocab": {"a": [0]}}}, r"model\.vocab gives the id \[0\] to 'a'"),
        ({"decoder": {"type": ["x"]}}, r"decoder\.type is \['x'\]"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": {}}]}}, r"decoder\.type is \{\}"),
        ({"pre_tokenizer": {"type": [{"type": "ByteLevel"}]}}, r"pre_tokenizer\.type is \[\{"),
        ({"normalizer": {"type": None}}, r"normalizer\.type is None"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(fields: Any, problem: str, small: Path) -> None:
    change(small, **fields)
    with pytest.raises(FormatError, match=rf"tokenizer\.json: {problem}[^\n]*$"):
        tokenizer_from_directory(small)


def test_other_models_are_not_guessed(small: Path) -> None:
    change(small, model={"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"})
    with pytest.raises(Unsupported, match="WordPiece"):
        tokenizer_from_directory(small)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)*b", "((x|y)z)+", "(?:a{1,9})+"])
def test_patterns_without_a_bound_in_time_are_refused(pattern: str, small: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    change(small, pre_tokenizer=split)
    with pytest.raises(Unsupported, match="repeats repetitions"):
        tokenizer_from_directory(small)


@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "x*"}])
def test_normalizers_that_would_make_a_text_explode_are_refused(pattern: dict[str, str], small: Path) -> None:
    double = {"type": "Replace", "pattern": pattern, "content": "aa"}
    change(small, normalizer={"type": "Sequence", "normalizers": [double] * 28})
    with pytest.raises(Unsupported, match="times longer; the limit is 64"):
        tokenizer_from_directory(small)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    change(small, normalizer={"type": "Sequence", "normalizers": [space]})
    tokenizer_from_directory(small)


SOUND: list[dict[str, Any]] = [
    {
        "added_tokens": [{"id": 3, "content": "<s>", "special": True} | FLAGS],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\d|\\s+"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {"h": 0, "e": 1, "he": 2}, "merges": [["h", "e"]], "unk_token": None},
    },
    {
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True} | FLAGS],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁he", -1.5]], "byte_fallback": False},
    },
]
VALUES = st.one_of(
    st.sampled_from([None, True, 0, 1, -1, 2**22, 2**31, 2**32, 2**63, 2**64, 0.5, -1e300]),
    st.sampled_from(["", "x", "he", "<s>", "▁", "\n", "\0", "BPE", "Unigram", "ByteLevel", "Metaspace", "Sequence"]),
    st.sampled_from(
        ["NFC", "Replace", "Split", "Prepend", "ByteFallback", "Fuse", "Strip", "WordPiece", "Precompiled"]
    ),
    st.sampled_from([[], {}, [[]], [{}], ["x"], [0], {"x": None}, {"type": []}, {"String": "x"}, {"Regex": "(("}]),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(value[key], (*at, key))


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    content: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(SOUND)))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(list(places(content)) or [("x",)]))
        target: Any = content
        for key in way:
            target = target[key]
        if draw(st.booleans()) or last not in target:
            target[last] = copy.deepcopy(draw(VALUES))
        else:
            del target[last]
    return content


def use_or_refuse(directory: Path) -> None:
    """A tokenizer that works, or an error of one line that names the place."""
    try:
        tokenizer = tokenizer_from_directory(directory)
        for raw in (True, False):
            ids = tokenizer.encode("he 12 <s>é", raw=raw)
            decoder = tokenizer.decoder()
            assert all(isinstance(decoder.push(token), str) for token in ids)
        assert all(0 <= end < tokenizer.vocab_size for end in tokenizer.turn_end_tokens(None))
    except Error as error:
        assert str(directory) in str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < 600


@pytest.mark.parametrize("content", SOUND)
def test_the_tokenizers_are_sound_before_they_are_damaged(content: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, "tokenizer.json", content)
    tokenizer = tokenizer_from_directory(tmp_path)
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, tokenizer.encode("he", raw=True))).strip() == "he"


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(mutated())
def test_a_tokenizer_with_any_values_replaced_works_or_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    write(tmp_path, "tokenizer.json", content)
    use_or_refuse(tmp_path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(SOUND),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_a_tokenizer_with_flipped_bytes_works_or_is_refused(
    tmp_path: Path, content: dict[str, Any], flips: list[tuple[float, int]]
) -> None:
    data = bytearray(json.dumps(content).encode())
    for place, byte in flips:
        data[int(place * len(data))] = byte
    (tmp_path / "tokenizer.json").write_bytes(data)
    use_or_refuse(tmp_path)
