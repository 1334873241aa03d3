"""Tokens to text: never half a character, and the same text however it is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_os.drivers.formats.gguf import GgufFile
from llm_os.drivers.formats.streaming import Utf8Decoder
from llm_os.drivers.formats.tokenizer import Tokenizer, tokenizer_from_gguf
from llm_os.drivers.formats.vocabulary import BYTES_OF_CHARACTERS

BYTE_LEVEL: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*BYTES_OF_CHARACTERS, "<|end|>", "<tool>"],
    "tokenizer.ggml.token_type": [1] * 256 + [3, 4],
    "tokenizer.ggml.merges": [],
}


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Path) -> Tokenizer:
    file = GgufFile(smollm2)
    file.close()
    return tokenizer_from_gguf(file.metadata, "smollm2.gguf")


@pytest.fixture(scope="module")
def every_byte() -> Tokenizer:
    return tokenizer_from_gguf(BYTE_LEVEL, "x.gguf")


@pytest.fixture(scope="module")
def scored() -> Tokenizer:
    data = json.loads((Path(__file__).parents[2] / "data" / "scored_tokens.json").read_text(encoding="utf-8"))
    fields = {f"tokenizer.ggml.{name}": data[name] for name in ("tokens", "scores", "token_type")}
    return tokenizer_from_gguf(fields | {"tokenizer.ggml.model": "llama"}, "x.gguf")


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.decoder()
    return [*map(decoder.push, ids), decoder.flush()]


def test_a_character_of_several_tokens_comes_whole_with_the_last(smollm2_tokenizer: Tokenizer) -> None:
    ids = smollm2_tokenizer.encode("你", raw=True)
    assert len(ids) == 2
    assert stream(smollm2_tokenizer, ids) == ["", "你", ""]


def test_an_emoji_of_byte_tokens_comes_whole_with_the_last(scored: Tokenizer) -> None:
    ids = scored.encode("😀", raw=True)
    assert len(ids) == 6  # beginning of text, space, four bytes
    assert stream(scored, ids) == ["", "", "", "", "", "😀", ""]


def test_what_is_left_of_a_character_shows_as_replacement(every_byte: Tokenizer) -> None:
    start, more = (every_byte.encode("😀", raw=True)[i] for i in (0, 1))
    assert stream(every_byte, [start, more]) == ["", "", "\ufffd"]


def test_a_broken_character_shows_as_soon_as_it_is_broken(every_byte: Tokenizer) -> None:
    emoji, a = every_byte.encode("😀", raw=True), every_byte.encode("a", raw=True)
    assert stream(every_byte, [*emoji[:2], *a]) == ["", "", "\ufffda", ""]
    assert stream(every_byte, [emoji[1]]) == ["\ufffd", ""]


def test_control_tokens_are_not_shown_and_user_defined_ones_are(every_byte: Tokenizer) -> None:
    assert stream(every_byte, [256, 257]) == ["", "<tool>", ""]


@pytest.mark.parametrize("token", [-1, 258, 2**40])
def test_ids_beyond_the_vocabulary_are_not_shown(token: int, every_byte: Tokenizer) -> None:
    assert stream(every_byte, [token]) == ["", ""]


def test_the_encoders_leading_space_is_not_shown_at_the_beginning_of_a_text(scored: Tokenizer) -> None:
    ids = scored.encode("Hello world", raw=True)
    assert "".join(stream(scored, ids)) == "Hello world"
    assert "".join(stream(scored, ids[1:])) == " Hello world", "an answer goes on after the prompt's last word"


@given(pieces=st.lists(st.binary(max_size=6)))
def test_joined_pushes_are_the_whole_bytes_decoded(pieces: list[bytes]) -> None:
    decoder = Utf8Decoder(pieces.__getitem__)
    text = "".join(map(decoder.push, range(len(pieces)))) + decoder.flush()
    assert text == b"".join(pieces).decode("utf-8", "replace")


@given(ids=st.lists(st.integers(0, 49151), max_size=40))
@settings(max_examples=200, deadline=None)
def test_random_tokens_never_show_half_a_character(ids: list[int], smollm2_tokenizer: Tokenizer) -> None:
    chunks = stream(smollm2_tokenizer, ids)
    for chunk in chunks:
        chunk.encode("utf-8")
    whole = b"".join(smollm2_tokenizer.decoder()._piece(token) for token in ids)
    assert "".join(chunks) == whole.decode("utf-8", "replace")


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_from_a_vocabulary_with_every_byte(text: str, every_byte: Tokenizer) -> None:
    plain = text.replace("<tool>", "")
    assert "".join(stream(every_byte, every_byte.encode(plain, raw=True))) == plain


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_from_a_scored_vocabulary(text: str, scored: Tokenizer) -> None:
    plain = text.replace("\u2581", "").replace("\t\t", "\t").replace("\t\t", "\t")
    assert "".join(stream(scored, scored.encode(plain, raw=True))) == plain


@given(text=st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cn", "Co"])))
@settings(max_examples=300, deadline=None)
def test_printable_text_comes_back_from_smollm2(text: str, smollm2_tokenizer: Tokenizer) -> None:
    # Its vocabulary lacks the bytes of some control characters and of planes that have no characters yet.
    assert "".join(stream(smollm2_tokenizer, smollm2_tokenizer.encode(text, raw=True))) == text
