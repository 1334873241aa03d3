"""Text to token ids by the metadata of a GGUF file. Directories with `tokenizer.json` are in `tokenizer_json`.

Byte-level BPE is the `tokenizers` library's; the rules around it are llama.cpp's, whose ids are the reference. Knows
nothing of tensors or prompts; of chat templates only their text, which tells turn markers from ends of text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from llm_os.drivers.formats.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from llm_os.drivers.formats.score_merges import ScoreMerges
from llm_os.drivers.formats.streaming import Utf8Decoder
from llm_os.drivers.formats.vocabulary import BYTES_OF_CHARACTERS, Kind, SpecialTokens, Vocabulary
from llm_os.kernel.errors import FormatError, RequestError, Unsupported

# Characters of one text. A million tokens fit; the library takes 200 bytes for each character while it works, and its
# regex engine gives up after ten million steps back.
MAX_TEXT = 4_000_000

T = TypeVar("T")
D = TypeVar("D")
Encode = Callable[[str, bool], list[int]]  # (text, whether special tokens are recognised) -> ids, without any prefix


class Tokenizer:
    """One model's tokens. Immutable; any thread may use it."""

    def __init__(self, vocabulary: Vocabulary, encode: Encode, *, add_bos: bool, prefix_space: bool) -> None:
        self._vocabulary = vocabulary
        self._encode = encode
        self._add_bos = add_bos and vocabulary.bos is not None
        self._start = vocabulary.bos if prefix_space else None
        self.bos = vocabulary.text(vocabulary.bos)
        self.eos = vocabulary.text(vocabulary.eos)

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    def encode(self, text: str, *, raw: bool) -> list[int]:
        """Token ids of `text`: user text as it stands (`raw`), or a rendered chat with its special tokens.

        The beginning-of-text token is added if the model asks for one and a chat does not bring its own; an end token
        never. Half surrogates count as U+FFFD. Raises RequestError past MAX_TEXT characters.
        """
        if len(text) > MAX_TEXT:
            raise RequestError(f"the text has {len(text)} characters; the limit is {MAX_TEXT}")
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self._encode(text, not raw)
        if self._add_bos and (raw or not text.startswith(self.bos)):
            assert self._vocabulary.bos is not None
            ids.insert(0, self._vocabulary.bos)
        return ids

    def piece(self, token: int) -> bytes:
        """What a token says; b"" for one that is no text."""
        return self._vocabulary.piece(token)

    def decoder(self) -> Utf8Decoder:
        """A fresh streaming decoder.

        The space that SentencePiece models put before a text is left out after a beginning-of-text token, and kept in
        what continues a text: an answer's first word is a word of its own.
        """
        return Utf8Decoder(self._vocabulary.piece, self._start)

    def turn_end_tokens(self, template: str | None) -> frozenset[int]:
        """Tokens that end an answer in a chat: eos, end of turn, and well-known names of either."""
        return self._vocabulary.turn_ends()

    def text_end_tokens(self, template: str | None) -> frozenset[int]:
        """Tokens that end a raw completion: ends of text, but no turn markers of the chat template."""
        return self._vocabulary.text_ends(template)


def tokenizer_from_directory(path: Path) -> Tokenizer:
    """The tokenizer of a safetensors directory. Raises FormatError or Unsupported, naming the file."""
    from llm_os.drivers.formats.tokenizer_json import read_directory

    return read_directory(path)


def tokenizer_from_gguf(metadata: Mapping[str, Any], file: str) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describe; undecodable bytes in strings are surrogate escapes.

    Raises FormatError for a field that is missing or wrong, Unsupported for a kind of tokenizer that is not known.
    """
    return _Gguf(metadata, file).tokenizer()


class _Gguf:
    """Reads `tokenizer.ggml.*`, distrusting each field."""

    def __init__(self, metadata: Mapping[str, Any], file: str) -> None:
        self._metadata = metadata
        self._file = file

    def tokenizer(self) -> Tokenizer:
        model = self._get("model", str, "")
        if not model:
            self._fail("model", "is missing: the file has no tokenizer")
        if model not in ("gpt2", "llama"):
            raise Unsupported(
                f"{self._file}: tokenizer.ggml.model is {model[:80]!r}; supported are 'gpt2' (byte-level BPE) and "
                "'llama' (SentencePiece with scores)"
            )
        tokens = self._tokens()
        return self._scored(tokens) if model == "llama" else self._byte_level(tokens)

    def _byte_level(self, tokens: list[str]) -> Tokenizer:
        pre = self._pre_tokenizer()
        vocabulary = self._vocabulary(tokens, byte_level=True, bos=None, eos=None)
        known = set(tokens)
        # A byte that is no token vanishes in the end, but until then it keeps its neighbours from merging.
        holes = [character for character in BYTES_OF_CHARACTERS if character not in known]
        library = self._library([*tokens, *holes], pre)
        chat, raw = self._finders(vocabulary)
        size = len(tokens)

        def encode(text: str, special: bool) -> list[int]:
            ids: list[int] = []
            for part in (chat if special else raw).split(text):
                if isinstance(part, int):
                    ids.append(part)
                else:
                    ids += library.encode(part, add_special_tokens=False).ids
            return [token for token in ids if token < size] if holes else ids

        return Tokenizer(vocabulary, encode, add_bos=self._add_bos(vocabulary, pre.add_bos), prefix_space=False)

    def _scored(self, tokens: list[str]) -> Tokenizer:
        vocabulary = self._vocabulary(tokens, byte_level=False, bos=1, eos=2)
        scores: list[float] | None = self._array("scores", (float, int), len(tokens))
        if scores is None:
            self._fail("scores", "is missing")
        if any(map(math.isnan, scores)):
            self._fail("scores", "has a NaN")
        merges = ScoreMerges(tokens, scores, self._token("unknown_token_id", len(tokens), 0))
        prefix = " " if self._get("add_space_prefix", bool, True) else ""
        chat, raw = self._finders(vocabulary)

        def encode(text: str, special: bool) -> list[int]:
            ids: list[int] = []
            start = prefix  # goes before a text, and before what follows a special token
            for part in (chat if special else raw).split(text):
                if isinstance(part, int):
                    ids.append(part)
                    start = prefix
                else:
                    ids += merges.encode((start + part).replace(" ", "▁"))
                    start = ""
            return ids

        return Tokenizer(vocabulary, encode, add_bos=self._add_bos(vocabulary, True), prefix_space=bool(prefix))

    def _vocabulary(self, tokens: list[str], *, byte_level: bool, bos: int | None, eos: int | None) -> Vocabulary:
        size = len(tokens)
        ends = [self._token(f"{role}_token_id", size, None) for role in ("eot", "eom")]
        return Vocabulary(
            tokens,
            self._array("token_type", int, size) or [Kind.NORMAL] * size,
            byte_level=byte_level,
            bos=self._token("bos_token_id", size, bos),
            eos=self._token("eos_token_id", size, eos),
            ends=[end for end in ends if end is not None],
        )

    def _tokens(self) -> list[str]:
        listed: list[str] | None = self._array("tokens", str, None)
        if not listed:
            self._fail("tokens", "is missing or empty")
        tokens = [text or f"[EMPTY_{token}]" for token, text in enumerate(listed)]  # llama.cpp's name for it
        if len(set(tokens)) != len(tokens):
            self._fail("tokens", f"has {Counter(tokens).most_common(1)[0][0][:80]!r} more than once")
        return tokens

    def _pre_tokenizer(self) -> PreTokenizer:
        name = self._get("pre", str, "default")  # files from before the field existed; llama.cpp reads them so too
        if name not in PRE_TOKENIZERS:
            raise Unsupported(
                f"{self._file}: tokenizer.ggml.pre is {name[:80]!r}, which is none of the "
                f"{len(PRE_TOKENIZERS)} pre-tokenizers that are supported"
            )
        return PRE_TOKENIZERS[name]

    def _library(self, tokens: list[str], pre: PreTokenizer) -> Library:
        ids = {text: token for token, text in enumerate(tokens)}
        listed: list[str] | None = self._array("merges", str, None)
        if listed is None:
            self._fail("merges", "is missing")
        pairs = [(merge[: (at := merge.find(" ", 1))], merge[at + 1 :]) for merge in listed]
        merges = list(dict.fromkeys(pairs))  # of two equal merges the first counts
        try:
            library = Library(models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges))
        except Exception as error:
            self._check_merges(listed, ids)
            self._fail("tokens", f"cannot be used: {str(error).splitlines()[0]}")
        if any(" " not in merge[1:] for merge in listed):
            self._check_merges(listed, ids)
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        return library

    def _check_merges(self, merges: list[str], ids: dict[str, int]) -> None:
        """Raises FormatError for the first that is wrong, which the library does not name."""
        for index, merge in enumerate(merges):
            at = merge.find(" ", 1)
            left, right = merge[:at], merge[at + 1 :]
            if at < 0 or left not in ids or right not in ids or left + right not in ids:
                self._fail(f"merges[{index}]", f"is {merge[:80]!r}; its two parts and their union must be tokens")

    def _finders(self, vocabulary: Vocabulary) -> tuple[SpecialTokens, SpecialTokens]:
        """What is recognised in chat text, and in raw text. phi-3's tokens swallow the white space after them."""
        name = self._metadata.get("general.name")
        phi3 = isinstance(name, str) and any(part in name.lower() for part in ("phi-3", "phi3"))
        strip = set(vocabulary.tokens) - {"<unk>", "<s>", "<|endoftext|>"} if phi3 else set()
        chat = vocabulary.of_kind(Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN)
        raw = vocabulary.of_kind(Kind.USER_DEFINED)
        return SpecialTokens(chat, strip), SpecialTokens(raw, strip)

    def _add_bos(self, vocabulary: Vocabulary, default: bool) -> bool:
        add = self._get("add_bos_token", bool, None)
        if add and vocabulary.bos is None:
            self._fail("add_bos_token", "is true, but there is no tokenizer.ggml.bos_token_id")
        return default if add is None else add

    def _get(self, field: str, kind: type[T], default: D) -> T | D:
        value = self._metadata.get(f"tokenizer.ggml.{field}", default)
        if value is not default and not isinstance(value, kind):
            self._fail(field, f"is a {type(value).__name__}; it must be a {kind.__name__}")
        return value

    def _token(self, field: str, size: int, default: int | None) -> int | None:
        token = self._get(field, int, None)
        if token is None:
            return default if default is None or default < size else None
        if isinstance(token, bool) or not 0 <= token < size:
            self._fail(field, f"is {token}; it must be below the {size} tokens of tokenizer.ggml.tokens")
        return token

    def _array(self, field: str, kind: type | tuple[type, ...], size: int | None) -> list[Any] | None:
        values = self._get(field, list, None)
        if values is None:
            return None
        if not all(isinstance(value, kind) for value in values):
            self._fail(field, f"must be an array of {kind.__name__ if isinstance(kind, type) else 'numbers'}")
        if size is not None and len(values) != size:
            self._fail(field, f"has {len(values)} entries; tokenizer.ggml.tokens has {size}")
        return values

    def _fail(self, field: str, problem: str) -> NoReturn:
        raise FormatError(f"{self._file}: tokenizer.ggml.{field} {problem}")
