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

import msgspec
from tokenizers import Tokenizer as Library

from llm_os.drivers.formats.tokenizer import Tokenizer
from llm_os.drivers.formats.vocabulary import Kind, Vocabulary
from llm_os.kernel.errors import FormatError, Unsupported

MAX_TOKENIZER = 128 * 1024 * 1024  # bytes; gemma3's, with 262,144 tokens, has 33 MB
MAX_SETTINGS = 16 * 1024 * 1024
MAX_TOKENS = 1 << 22

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def read_directory(path: Path) -> Tokenizer:
    """Raises FormatError or Unsupported, naming the file and the field."""
    file = path / "tokenizer.json"
    description = _read(file, MAX_TOKENIZER)
    if description is None:
        raise FormatError(f"{file} is missing: the model has no tokenizer")
    source = _Json(file, description)
    settings = _read(path / "special_tokens_map.json", MAX_SETTINGS) or {}
    settings |= _read(path / "tokenizer_config.json", MAX_SETTINGS) or {}
    generation = _read(path / "generation_config.json", MAX_SETTINGS) or {}
    tokens, kinds = source.tokens()
    byte_level = source.is_byte_level()
    ids = {text: token for token, text in enumerate(tokens) if text}
    bos, eos = (ids.get(_text(settings.get(f"{role}_token"))) for role in ("bos", "eos"))
    ends = generation.get("eos_token_id")
    listed = [ends] if isinstance(ends, int) else ends or []
    if not isinstance(listed, list) or not all(isinstance(end, int) and end >= 0 for end in listed):
        raise FormatError(f"{path / 'generation_config.json'}: eos_token_id is neither a token id nor a list of them")
    listed = [end for end in listed if end < len(tokens)]
    if eos is None and listed:
        eos = listed[0]
    vocabulary = Vocabulary(tokens, kinds, byte_level=byte_level, bos=bos, eos=eos, ends=listed)
    with _library_errors(file):
        chat = Library.from_str(source.text)
        add_bos = settings.get("add_bos_token")
        if not isinstance(add_bos, bool):  # then the post-processor decides
            add_bos = bos is not None and chat.encode("").ids[:1] == [bos]
    return Tokenizer(vocabulary, _Encoder(chat, file, source.text), add_bos=add_bos, prefix_space=source.adds_space())


class _Encoder:
    """Two instances of the library's tokenizer: whether special tokens are recognised is a property of one."""

    def __init__(self, chat: Library, file: Path, description: str) -> None:
        chat.no_padding()
        chat.no_truncation()
        self._chat = chat
        self._file = file
        self._description = description
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
                raw = Library.from_str(self._description)
                raw.no_padding()
                raw.no_truncation()
                raw.encode_special_tokens = True
                self._raw, self._description = raw, ""
            return self._raw


class _Json:
    """What of `tokenizer.json` is read here rather than by the library, with each field distrusted."""

    def __init__(self, file: Path, description: dict[str, Any]) -> None:
        self._file = file
        self._description = description
        self._model = self._object("model")
        self.text = file.read_text(encoding="utf-8")
        for pattern in self._find("Regex"):
            if isinstance(pattern, str) and _repeats_repetition(pattern):
                raise Unsupported(f"{file}: the pattern {pattern[:80]!r} repeats repetitions; its time has no bound")

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
            byte = self._model.get("byte_fallback") is True and isinstance(text, str) and _BYTE_TOKEN.fullmatch(text)
            found[token] = text, Kind.BYTE if byte else Kind.UNKNOWN if text == unknown else Kind.NORMAL
        added = self._description.get("added_tokens") or []
        if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
            self._fail("added_tokens", "is no list of objects")
        for entry in added:
            special = Kind.CONTROL if entry.get("special") is True else Kind.USER_DEFINED
            found[entry.get("id")] = entry.get("content"), special
        for token, (text, _) in found.items():
            if not isinstance(token, int) or not 0 <= token < MAX_TOKENS or not isinstance(text, str):
                self._fail("model.vocab or added_tokens", f"gives the id {str(token)[:80]} to {str(text)[:80]!r}")
        if not found:
            self._fail("model.vocab", "is empty")
        size = max(found) + 1
        tokens, kinds = [""] * size, [int(Kind.UNUSED)] * size
        for token, (text, kind) in found.items():
            tokens[token], kinds[token] = text, kind
        return tokens, kinds

    def is_byte_level(self) -> bool:
        """How tokens spell text: as GPT-2's bytes, or with U+2581 for spaces."""
        types = {kind for part in ("decoder", "pre_tokenizer") for kind in self._find("type", part)}
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
        parts = (part,) if part else ("normalizer", "pre_tokenizer", "decoder")
        return [inner[name] for key in parts for inner in self._parts(self._description.get(key)) if name in inner]

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


def _read(file: Path, limit: int) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file."""
    try:
        if not file.exists():
            return None
        if (size := file.stat().st_size) > limit:
            raise FormatError(f"{file} has {size} bytes; the limit is {limit}")
        value = msgspec.json.decode(file.read_bytes())
    except (OSError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} is no readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file} is no JSON object")
    return value


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
