"""Tokenizers of safetensors directories: the same ids as from GGUF, and what damaged files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llm_os.drivers.formats.gguf import GgufFile
from llm_os.drivers.formats.tokenizer import tokenizer_from_directory, tokenizer_from_gguf
from llm_os.kernel.errors import FormatError, Unsupported

CASES = json.loads((Path(__file__).parents[2] / "data" / "smollm2_tokens.json").read_text(encoding="utf-8"))["cases"]


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


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_a_damaged_file_beside_it_is_named(name: str, small: Path) -> None:
    (small / name).write_text("{", encoding="utf-8")
    with pytest.raises(FormatError, match=re.escape(name)):
        tokenizer_from_directory(small)


@pytest.mark.parametrize("ends", ["2", {"a": 1}, ["2"], [-1], 1.5])
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
    ],
)
def test_damaged_vocabularies_are_refused(model: Any, small: Path) -> None:
    change(small, model=model, added_tokens=[])
    with pytest.raises(FormatError, match=r"tokenizer\.json: [^\n]+$"):
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
