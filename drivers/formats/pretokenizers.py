"""What the `tokenizer.ggml.pre` names stand for: how byte-level BPE cuts text into words before it merges.

Facts are those of llama.cpp (`llama-vocab.cpp`, `unicode.cpp`): patterns are applied one after the other, each to the
pieces that the last one left; what a pattern does not match stays a piece of its own. Written for Oniguruma, so that
each pattern takes time in proportion to the text. Knows nothing of vocabularies, merges or files.
"""

from __future__ import annotations

from msgspec import Struct


class PreTokenizer(Struct, frozen=True, kw_only=True):
    """How one family cuts words, and the defaults that come with its name."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is in the vocabulary is not merged, but taken whole
    add_bos: bool = False  # unless `tokenizer.ggml.add_bos_token` says otherwise


_SUFFIX = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"


def _words(digits: str) -> str:
    """The pattern of tiktoken's cl100k family, which differ in how many digits make a word."""
    return rf"(?:{_SUFFIX})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_PUNCTUATION}|{_SPACES}"


# llama.cpp knows upper and lower case of ASCII only: every other letter counts as both.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"


def _cased(suffix: str, digits: str) -> str:
    """The pattern of the o200k family, where a word also ends where lower case turns to upper case."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


# What llama.cpp's "\p{P}" is in a class of its own: the category, not Oniguruma's wider [[:punct:]].
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _SPACES,
)
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_SENTENCE = r" ?[^(\s|.,!?…。，、।۔،)]+"
_THREE_DIGITS = "[0-9][0-9][0-9]"

_LLAMA3 = PreTokenizer(patterns=(_words(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer(patterns=(_words(r"\p{N}"),))
_PLAIN = PreTokenizer(patterns=(_GPT2,))
_DIGITS = PreTokenizer(patterns=(r"\p{N}", _GPT2))
_O200K = PreTokenizer(patterns=(_cased(f"(?:{_SUFFIX})?", r"\p{N}{1,3}"),))
_BLOOM = PreTokenizer(patterns=(_SENTENCE,))

_FAMILIES: tuple[tuple[PreTokenizer, str], ...] = (
    (
        PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS)),
        "default",
    ),
    (
        PreTokenizer(patterns=_LLAMA3.patterns, ignore_merges=True, add_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    (_LLAMA3, "dbrx smaug-bpe chatglm-bpe"),
    (PreTokenizer(patterns=_LLAMA3.patterns, ignore_merges=True), "glm4 glm5"),
    (_QWEN2, "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (
        PreTokenizer(
            patterns=(
                rf"(?:{_SUFFIX})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
                + _SPACES,
            )
        ),
        "qwen35",
    ),
    (
        _PLAIN,
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert "
        "jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe",
    ),
    (_DIGITS, "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (_O200K, "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (PreTokenizer(patterns=(_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True), "tekken"),
    (PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS)), "falcon"),
    (_BLOOM, "bloom poro-chat gpt3-finnish"),
    (PreTokenizer(patterns=(_SENTENCE, r"\p{N}")), "viking"),
    (PreTokenizer(patterns=_DEEPSEEK3), "deepseek-v3 hunyuan-dense joyai-llm"),
    (
        PreTokenizer(
            patterns=(
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
                r"(?<!\s)\s++\z",
                "[一-龥ࠀ-一가-\ud7ff]+",
                r"\p{N}+",
            )
        ),
        "deepseek-llm",
    ),
    (
        PreTokenizer(patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")),
        "deepseek-coder",
    ),
    (
        PreTokenizer(
            patterns=(
                r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
        "bailingmoe bailingmoe2 llada-moe",
    ),
    (
        PreTokenizer(
            patterns=(rf"(?:{_SUFFIX})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|" + _SPACES,)
        ),
        "seed-coder",
    ),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: family for family, names in _FAMILIES for name in names.split()}
