"""Token ids against llama.cpp's, and what damaged tokenizer metadata say. The reference ids are in tests/data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_os.drivers.formats.gguf import GgufFile
from llm_os.drivers.formats.pretokenizers import PRE_TOKENIZERS
from llm_os.drivers.formats.tokenizer import MAX_TEXT, Tokenizer, tokenizer_from_gguf
from llm_os.kernel.errors import FormatError, RequestError, Unsupported

DATA = Path(__file__).parents[2] / "data"
Metadata = dict[str, Any]


def reference(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def metadata(smollm2: Path) -> Metadata:
    file = GgufFile(smollm2)
    file.close()
    return file.metadata


@pytest.fixture(scope="module")
def tokenizer(metadata: Metadata) -> Tokenizer:
    return tokenizer_from_gguf(metadata, "smollm2.gguf")


@pytest.mark.parametrize("case", reference("smollm2_tokens.json")["cases"], ids=lambda case: ascii(case["text"][:20]))
def test_smollm2_ids_are_llama_cpps_with_and_without_special_tokens(case: Any, tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(case["text"], raw=True) == case["plain"]
    assert tokenizer.encode(case["text"], raw=False) == case["special"]


def test_smollm2_ids_of_the_generation_reference(tokenizer: Tokenizer) -> None:
    for case in reference("smollm2_reference.json")["cases"]:
        assert tokenizer.encode(case["prompt"], raw=True) == case["ids"]


@pytest.mark.parametrize("case", reference("pre_tokenizer_tokens.json")["cases"], ids=lambda case: case["pre"])
def test_each_pre_tokenizer_cuts_words_as_llama_cpp_does(case: Any, metadata: Metadata) -> None:
    fields = metadata | {"tokenizer.ggml.pre": case["pre"], "tokenizer.ggml.add_bos_token": False}
    text = reference("pre_tokenizer_tokens.json")["text"]
    assert tokenizer_from_gguf(fields, "x.gguf").encode(text, raw=True) == case["ids"]


def test_every_kind_of_pre_tokenizer_has_reference_ids() -> None:
    referenced = [PRE_TOKENIZERS[case["pre"]] for case in reference("pre_tokenizer_tokens.json")["cases"]]
    assert all(kind in referenced for kind in PRE_TOKENIZERS.values())


@pytest.fixture(scope="module")
def scored() -> Callable[..., Metadata]:
    data = reference("scored_tokens.json")

    def fields(**changes: Any) -> Metadata:
        base: Metadata = {
            "model": "llama",
            "tokens": data["tokens"],
            "scores": data["scores"],
            "token_type": data["token_type"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        }
        return {f"tokenizer.ggml.{name}": value for name, value in (base | changes).items() if value is not None}

    return fields


@pytest.mark.parametrize("prefix", [True, False])
def test_scored_vocabulary_gives_llama_cpps_ids(prefix: bool, scored: Callable[..., Metadata]) -> None:
    tokenizer = tokenizer_from_gguf(scored(add_space_prefix=prefix), "x.gguf")
    cases = [case for case in reference("scored_tokens.json")["cases"] if case["add_space_prefix"] is prefix]
    assert cases
    for case in cases:
        assert tokenizer.encode(case["text"], raw=True) == case["plain"], case["text"]
        special = case["special"][1:] if case["text"].startswith("<s>") else case["special"]  # llama.cpp doubles it
        assert tokenizer.encode(case["text"], raw=False) == special, case["text"]


def test_beginning_token_is_added_once(scored: Callable[..., Metadata]) -> None:
    tokenizer = tokenizer_from_gguf(scored(), "x.gguf")
    assert tokenizer.bos == "<s>"
    assert tokenizer.encode("", raw=True) == [1]
    assert tokenizer.encode("the", raw=True)[:1] == tokenizer.encode("the", raw=False)[:1] == [1]
    assert tokenizer.encode("<s>the", raw=False) == tokenizer.encode("the", raw=False)
    assert tokenizer.encode("<s>", raw=True).count(1) == 1, "raw text that looks like the token stays text"
    without = tokenizer_from_gguf(scored(add_bos_token=False), "x.gguf")
    assert without.encode("the", raw=True) == tokenizer.encode("the", raw=True)[1:]


def test_end_token_is_never_added(scored: Callable[..., Metadata]) -> None:
    assert 2 not in tokenizer_from_gguf(scored(add_eos_token=True), "x.gguf").encode("the", raw=True)


def test_half_surrogates_count_as_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud800b", raw=True) == tokenizer.encode("a\ufffdb", raw=True)
    assert tokenizer.encode("\ud83d\ude00", raw=True) == tokenizer.encode("😀", raw=True)


@pytest.mark.parametrize("text", ["a", " ", "\n", "1", "<", "<|im_end|>", "e\u0301"])
def test_a_quarter_million_characters_are_tokenized_whole(text: str, tokenizer: Tokenizer) -> None:
    long = text * (250_000 // len(text))
    decoder = tokenizer.decoder()
    ids = tokenizer.encode(long, raw=True)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == long


@pytest.mark.parametrize("text", ["a", " ", "ab", "é"])
def test_long_runs_in_a_scored_vocabulary_are_tokenized_whole(text: str, scored: Callable[..., Metadata]) -> None:
    tokenizer = tokenizer_from_gguf(scored(), "x.gguf")
    decoder = tokenizer.decoder()
    ids = tokenizer.encode(text * 50_000, raw=True)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == text * 50_000


def test_a_text_past_the_limit_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=str(MAX_TEXT)):
        tokenizer.encode("a" * (MAX_TEXT + 1), raw=True)


def test_smollm2_ends(tokenizer: Tokenizer, metadata: Metadata) -> None:
    template = metadata["tokenizer.chat_template"]
    assert tokenizer.turn_end_tokens(template) == {0, 2}
    assert tokenizer.text_end_tokens(template) == {0}
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (49152, "<|im_start|>", "<|im_end|>")


def test_an_end_of_text_that_the_template_writes_still_ends_text(scored: Callable[..., Metadata]) -> None:
    tokenizer = tokenizer_from_gguf(scored(), "mistral.gguf")
    assert tokenizer.text_end_tokens("{{ message.content + '</s>' }}{{ eos_token }}") == {2}


def test_a_turn_marker_ends_text_only_where_there_is_no_other_end(scored: Callable[..., Metadata]) -> None:
    fields = scored()
    tokens = ["<|eot_id|>" if text == "</s>" else text for text in fields["tokenizer.ggml.tokens"]]
    only = tokenizer_from_gguf(fields | {"tokenizer.ggml.tokens": tokens}, "x.gguf")
    assert only.text_end_tokens("<|eot_id|>") == only.turn_end_tokens("<|eot_id|>") == {2}
    tokens[-1] = "<|end_of_text|>"
    both = tokenizer_from_gguf(fields | {"tokenizer.ggml.tokens": tokens}, "x.gguf")
    assert both.turn_end_tokens("<|eot_id|>") == {2, len(tokens) - 1}
    assert both.text_end_tokens("<|eot_id|>") == {len(tokens) - 1}
    assert both.text_end_tokens("a template without it") == {2, len(tokens) - 1}


SMALL: Metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|end|>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("model", None, "is missing"),
        ("model", 7, "is a int"),
        ("tokens", None, "missing or empty"),
        ("tokens", [], "missing or empty"),
        ("tokens", ["a", "b", "ab", 4], "array of str"),
        ("tokens", "abcd", "is a str"),
        ("tokens", ["a", "b", "ab", "a"], "'a' more than once"),
        ("token_type", [1, 1, 1], "has 3 entries; tokenizer.ggml.tokens has 4"),
        ("token_type", ["x"] * 4, "array of int"),
        ("merges", None, "is missing"),
        ("merges", ["a b", "b c"], "'b c'"),
        ("merges", ["ab"], "'ab'"),
        ("merges", ["b a"], "their union"),
        ("eos_token_id", 4, "is 4; it must be below the 4"),
        ("eos_token_id", -1, "is -1"),
        ("bos_token_id", 2**31, "below the 4"),
        ("eot_token_id", "3", "is a str"),
        ("add_bos_token", True, "no tokenizer.ggml.bos_token_id"),
        ("add_bos_token", 1, "is a int"),
    ],
)
def test_damaged_metadata_name_the_field(field: str, value: Any, says: str) -> None:
    fields = {k: v for k, v in (SMALL | {f"tokenizer.ggml.{field}": value}).items() if v is not None}
    with pytest.raises(FormatError) as failure:
        tokenizer_from_gguf(fields, "x.gguf")
    message = str(failure.value)
    assert message.startswith(f"x.gguf: tokenizer.ggml.{field}")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "says"),
    [({"scores": None}, "scores is missing"), ({"scores": [0.0]}, "has 1 entries"), ({"scores": "x"}, "is a str")],
)
def test_damaged_scores_name_the_field(change: Metadata, says: str, scored: Callable[..., Metadata]) -> None:
    with pytest.raises(FormatError, match=re.escape(says)):
        tokenizer_from_gguf(scored(**change), "x.gguf")


def test_scores_without_an_order_are_refused(scored: Callable[..., Metadata]) -> None:
    fields = scored()
    fields["tokenizer.ggml.scores"] = [float("nan"), *fields["tokenizer.ggml.scores"][1:]]
    with pytest.raises(FormatError, match="has a NaN"):
        tokenizer_from_gguf(fields, "x.gguf")


@pytest.mark.parametrize(("field", "name"), [("pre", "no-such-pre"), ("model", "bert")])
def test_unknown_tokenizers_are_named_and_not_guessed(field: str, name: str) -> None:
    with pytest.raises(Unsupported, match=name):
        tokenizer_from_gguf(SMALL | {f"tokenizer.ggml.{field}": name}, "x.gguf")


def test_bytes_without_a_token_vanish_but_keep_their_neighbours_apart() -> None:
    assert tokenizer_from_gguf(SMALL, "x.gguf").encode("ab", raw=True) == [2]
    assert tokenizer_from_gguf(SMALL, "x.gguf").encode("acb", raw=True) == [0, 1]
