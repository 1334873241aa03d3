"""The tokenizer of a safetensors directory: `tokenizer.json` through the library, and who begins and ends a text.

`tokenizer_config.json`, `special_tokens_map.json` and `generation_config.json` say which tokens those are. Knows
nothing of GGUF or chat templates.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer as Library

from llm_os.drivers.formats.json_files import decode_object, read_bytes, read_object
from llm_os.drivers.formats.mapped import shown
from llm_os.drivers.formats.tokenizer import Tokenizer
from llm_os.drivers.formats.vocabulary import Kind, Vocabulary
from llm_os.kernel.errors import FormatError, Unsupported

MAX_TOKENIZER = 64 << 20  # bytes; gemma3's, with 262,144 tokens and 514,906 merges, has 33 MB
MAX_VALUES = 3 << 20  # gemma3's has 1.9 million
MAX_TOKENS = 1 << 22

_MAX_GROWTH = 64  # " " to "▁" is 3; more than a few such steps is no tokenizer
_PIPELINE = ("normalizer", "pre_tokenizer", "decoder")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def read_directory(path: Path) -> Tokenizer:
    """Raises FormatError or Unsupported, naming the file and the field."""
    file = path / "tokenizer.json"
    data = read_bytes(file, MAX_TOKENIZER)
    if data is None:
        raise FormatError(f"{file} is missing: the model has no tokenizer")
    source = _Json(file, decode_object(data, str(file), MAX_VALUES))
    settings = read_object(path / "special_tokens_map.json") or {}
    settings |= read_object(path / "tokenizer_config.json") or {}
    generation = read_object(path / "generation_config.json") or {}
    tokens, kinds = source.tokens()
    byte_level = source.is_byte_level()
    ids = {text: token for token, text in enumerate(tokens) if text}
    bos, eos = (ids.get(_text(settings.get(f"{role}_token"))) for role in ("bos", "eos"))
    ends = generation.get("eos_token_id")
    listed = [ends] if type(ends) is int else ends or []
    if not isinstance(listed, list) or not all(type(end) is int and end >= 0 for end in listed):
        raise FormatError(f"{path / 'generation_config.json'}: eos_token_id is neither a token id nor a list of them")
    listed = [end for end in listed if end < len(tokens)]
    if eos is None and listed:
        eos = listed[0]
    vocabulary = Vocabulary(tokens, kinds, byte_level=byte_level, bos=bos, eos=eos, ends=listed)
    with _library_errors(file):
        chat = Library.from_buffer(data)
        add_bos = settings.get("add_bos_token")
        if not isinstance(add_bos, bool):  # then the post-processor decides
            add_bos = bos is not None and chat.encode("").ids[:1] == [bos]
    return Tokenizer(vocabulary, _Encoder(chat, file, data), add_bos=add_bos, prefix_space=source.adds_space())


class _Encoder:
    """Two instances of the library's tokenizer: whether special tokens are recognised is a property of one."""

    def __init__(self, chat: Library, file: Path, data: bytes) -> None:
        chat.no_padding()
        chat.no_truncation()
        self._chat = chat
        self._file = file
        self._data = data
        self._raw: Library | None = None
        self._lock = threading.Lock()

    def __call__(self, text: str, special: bool) -> list[int]:
        library = self._chat if special else self._plain()
        with _library_errors(self._file):
            ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    def _plain(self) -> Library:
        with self._lock:
            if self._raw is None:  # on first use: it costs as much time and memory as the other
                raw = Library.from_buffer(self._data)
                raw.no_padding()
                raw.no_truncation()
                raw.encode_special_tokens = True
                self._raw, self._data = raw, b""
            return self._raw


class _Json:
    """What of `tokenizer.json` is read here rather than by the library, with each field distrusted."""

    def __init__(self, file: Path, description: dict[str, Any]) -> None:
        self._file = file
        self._description = description
        self._model = self._object("model")
        for part in _PIPELINE:
            for kind in self._find("type", part):
                if not isinstance(kind, str):
                    self._fail(f"{part}.type", f"is {shown(kind)}; it must be a string")
        for pattern in self._find("Regex"):
            if isinstance(pattern, str) and _repeats_repetition(pattern):
                raise Unsupported(f"{file}: the pattern {pattern[:80]!r} repeats repetitions; its time has no bound")
        if (growth := self._growth()) > _MAX_GROWTH:
            raise Unsupported(
                f"{file}: its normalizers may make a text {growth:.0f} times longer; the limit is {_MAX_GROWTH}"
            )

    def tokens(self) -> tuple[list[str], list[int]]:
        """Texts and kinds by id; ids that nobody has are unused and empty."""
        kind = self._model.get("type") or ("BPE" if "merges" in self._model else "Unigram")
        if kind not in ("BPE", "Unigram"):
            raise Unsupported(f"{self._file}: model.type is {str(kind)[:80]!r}; supported are 'BPE' and 'Unigram'")
        listed = self._model.get("vocab")
        unknown = self._model.get("unk_token")
        found: dict[int, tuple[str, int]] = {}
        if isinstance(listed, dict):
            entries = [(token, text) for text, token in listed.items()]
        elif isinstance(listed, list) and all(isinstance(entry, list) and entry for entry in listed):
            entries = [(token, entry[0]) for token, entry in enumerate(listed)]
        else:
            self._fail("model.vocab", "is neither an object nor a list of pairs")
        for token, text in entries:
            self._check_token("model.vocab", token, text)
            byte = self._model.get("byte_fallback") is True and _BYTE_TOKEN.fullmatch(text)
            found[token] = text, Kind.BYTE if byte else Kind.UNKNOWN if text == unknown else Kind.NORMAL
        added = self._description.get("added_tokens") or []
        if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
            self._fail("added_tokens", "is no list of objects")
        for entry in added:
            token, text = entry.get("id"), entry.get("content")
            self._check_token("added_tokens", token, text)
            found[token] = text, Kind.CONTROL if entry.get("special") is True else Kind.USER_DEFINED
        if not found:
            self._fail("model.vocab", "is empty")
        size = max(found) + 1
        tokens, kinds = [""] * size, [int(Kind.UNUSED)] * size
        for token, (text, kind) in found.items():
            tokens[token], kinds[token] = text, kind
        return tokens, kinds

    def is_byte_level(self) -> bool:
        """How tokens spell text: as GPT-2's bytes, or with U+2581 for spaces."""
        types = self._find("type", "decoder") + self._find("type", "pre_tokenizer")
        if "ByteLevel" in types:
            return True
        if "Metaspace" in types or "▁" in self._find("content", "decoder") or "▁" in self._find("String", "decoder"):
            return False
        raise Unsupported(f"{self._file}: decoder is neither ByteLevel nor SentencePiece-style")

    def adds_space(self) -> bool:
        """Whether a text gets a space before its first word."""
        if "Prepend" in self._find("type", "normalizer"):
            return True
        for part in self._parts(self._description.get("pre_tokenizer")):
            if part.get("type") == "Metaspace":
                return part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space") is not False
        return False

    def _find(self, name: str, part: str | None = None) -> list[Any]:
        """Every value of the field `name` in a part of the pipeline."""
        parts = (part,) if part else _PIPELINE
        return [inner[name] for key in parts for inner in self._parts(self._description.get(key)) if name in inner]

    def _growth(self) -> float:
        """How many times longer the normalizers may make a text: replacements multiply, one after another."""
        growth = 1.0
        for step in self._parts(self._description.get("normalizer")):
            content, pattern = step.get("content"), step.get("pattern")
            if isinstance(content, str) and pattern is not None:
                literal = pattern.get("String") if isinstance(pattern, dict) else None
                shortest = len(literal.encode(errors="replace")) if isinstance(literal, str) else 0
                # a regular expression may match nothing, between any two characters
                grown = len(content.encode(errors="replace"))
                growth *= max(1.0, grown / shortest if shortest else 1.0 + grown)
        return growth

    def _parts(self, value: Any) -> Iterator[dict[str, Any]]:
        stack = [value]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                yield value
                stack.extend(value.values())
            elif isinstance(value, list):
                stack.extend(value)

    def _object(self, field: str) -> dict[str, Any]:
        value = self._description.get(field)
        if not isinstance(value, dict):
            self._fail(field, "is missing or no object")
        return value

    def _check_token(self, field: str, token: Any, text: Any) -> None:
        if type(token) is not int or not 0 <= token < MAX_TOKENS or not isinstance(text, str):
            self._fail(field, f"gives the id {shown(token)} to {shown(text)}; ids are from 0 to {MAX_TOKENS - 1}")

    def _fail(self, field: str, problem: str) -> NoReturn:
        raise FormatError(f"{self._file}: {field} {problem}")


def _repeats_repetition(pattern: str) -> bool:
    """Whether a group that repeats without end has a repetition or alternatives in it: time may grow exponentially."""
    open_groups: list[bool] = []
    inside = escaped = False
    risky_end = -1  # where a group with a choice in it has just ended
    for at, character in enumerate(pattern):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif inside:
            inside = character != "]"
        elif character == "[":
            inside = True
        elif character == "(":
            open_groups.append(False)
        elif character == ")" and open_groups:
            risky_end = at if open_groups.pop() else -1
            if open_groups and risky_end >= 0:
                open_groups[-1] = True
        elif character in "*+|" or (pattern[at : at + 1] == "{" and "," in pattern[at : at + 6]):
            if at and risky_end == at - 1 and character != "|":
                return True
            if open_groups:
                open_groups[-1] = True
    return False


def _text(token: Any) -> str:
    """A token as the configuration writes it: its text, or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


@contextmanager
def _library_errors(file: Path) -> Iterator[None]:
    """The library's errors, and Rust's panics, which Python takes for something like an interrupt."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{file}: {' '.join(str(error).split())[:300]}") from None
