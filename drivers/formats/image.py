"""Opens a model from disk as the kernel's `Image`, whatever its format. Knows the formats' doors, not their insides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.formats.chat import ChatTemplate
from llm_os.drivers.formats.fields import Fields
from llm_os.drivers.formats.generation import sampling_from_directory, sampling_from_gguf
from llm_os.drivers.formats.gguf import MAGIC, GgufFile
from llm_os.drivers.formats.gguf_architecture import ROPE_TENSORS, gguf_architecture
from llm_os.drivers.formats.gguf_weights import GgufWeights
from llm_os.drivers.formats.hf_architecture import hf_architecture, hf_family
from llm_os.drivers.formats.hf_weights import HfWeights
from llm_os.drivers.formats.json_files import read_object, read_text
from llm_os.drivers.formats.mapped import fingerprint, map_file
from llm_os.drivers.formats.safetensors import read_directory, read_file
from llm_os.drivers.formats.shapes import check_tensors
from llm_os.drivers.formats.tokenizer import Tokenizer, tokenizer_from_directory, tokenizer_from_gguf
from llm_os.drivers.formats.weights import Weights
from llm_os.kernel.errors import Closed, FormatError, RequestError, Unsupported
from llm_os.kernel.image import TextDecoder
from llm_os.kernel.request import SamplingDefaults


class ModelImage:
    """The `Image` of a model file or directory; for drivers also `hyperparameters`, `weights` and `path`."""

    def __init__(
        self,
        *,
        name: str,
        path: Path,
        hyperparameters: Architecture,
        weights: Weights,
        tokenizer: Tokenizer,
        template: str | None,
        sampling_defaults: SamplingDefaults,
    ) -> None:
        self._name = name
        self._path = path
        self._hyperparameters = hyperparameters
        self._weights = weights
        self._tokenizer = tokenizer
        self._template = template
        self._sampling_defaults = sampling_defaults
        self._turn_end_tokens = tokenizer.turn_end_tokens(template)
        self._text_end_tokens = tokenizer.text_end_tokens(template)
        self._fingerprint = fingerprint(path)
        self._closed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def path(self) -> Path:
        return self._path

    @property
    def hyperparameters(self) -> Architecture:
        return self._hyperparameters

    @property
    def weights(self) -> Weights:
        self._check_open()
        return self._weights

    @property
    def architecture(self) -> str:
        return self._hyperparameters.family

    @property
    def context_length(self) -> int:
        return self._hyperparameters.context_length

    @property
    def vocab_size(self) -> int:
        return self._hyperparameters.vocab_size

    @property
    def turn_end_tokens(self) -> frozenset[int]:
        return self._turn_end_tokens

    @property
    def text_end_tokens(self) -> frozenset[int]:
        return self._text_end_tokens

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        return self._sampling_defaults

    def encode(self, text: str, *, raw: bool) -> list[int]:
        self._check_open()
        tokens = self._tokenizer.encode(text, raw=raw)
        # Some tokenizers know more tokens than the model has embeddings (gemma3's text models: an image token).
        if tokens and max(tokens) >= self.vocab_size:
            raise RequestError(
                f"the text has token {max(tokens)}, but {self._name} knows only the {self.vocab_size} below it"
            )
        return tokens

    def token_bytes(self) -> Sequence[bytes]:
        return self._token_bytes

    def decoder(self) -> TextDecoder:
        self._check_open()
        return self._tokenizer.decoder()

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        self._check_open()
        if self._template is None:
            raise RequestError(f"{self._name} has no chat template; give it a raw prompt (--raw)")
        return self._chat.render(messages, tools)

    def fresh(self) -> bool:
        return self._fingerprint is not None and self._fingerprint == fingerprint(self._path)

    def close(self) -> None:
        self._closed = True
        self._weights.close()

    @cached_property
    def _token_bytes(self) -> tuple[bytes, ...]:
        return tuple(map(self._tokenizer.piece, range(self.vocab_size)))

    @cached_property
    def _chat(self) -> ChatTemplate:
        # On first use: a model whose template is broken still continues raw text.
        tokenizer = self._tokenizer
        return ChatTemplate(self._template or "", bos=tokenizer.bos, eos=tokenizer.eos, file=str(self._path))

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"{self._name} is closed")


def open_image(path: Path, name: str | None = None) -> ModelImage:
    """Opens a GGUF file, or a directory with `config.json` and safetensors. `name` is the path's by default.

    Raises ModelNotFound when nothing is there, FormatError when it is damaged or no model, Unsupported when it is a
    model that this version cannot run.
    """
    name = path.name if name is None else name
    if _is_directory(path):
        return _open_directory(path, name)
    if map_file(path)[:4] == MAGIC:
        return _open_gguf(path, name)
    if path.suffix == ".safetensors":
        read_file(path)  # says what is wrong, if something is
        raise FormatError(f"{path}: holds tensors only; give the directory with its config.json and tokenizer.json")
    raise FormatError(f"{path}: not a model: neither a GGUF file nor a directory with config.json")


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _open_gguf(path: Path, name: str) -> ModelImage:
    file = GgufFile(path)
    fields = Fields(file.metadata, str(path))
    if fields.integer("split.count", 0, 2**16, 0) > 1:
        raise Unsupported(f"{path}: one part of a split model; join the parts with llama-gguf-split --merge")
    hyperparameters = gguf_architecture(file)
    weights = GgufWeights(file, hyperparameters)
    check_tensors(weights.shapes(), hyperparameters, str(path), ignored=ROPE_TENSORS)
    tokenizer = tokenizer_from_gguf(file.metadata, str(path))
    file.metadata.pop("tokenizer.ggml.merges", None)  # the tokenizer has them: as many objects as the vocabulary
    return ModelImage(
        name=name,
        path=path,
        hyperparameters=hyperparameters,
        weights=weights,
        tokenizer=tokenizer,
        template=fields.text("tokenizer.chat_template", None) if fields.get("tokenizer.chat_template") else None,
        sampling_defaults=sampling_from_gguf(Fields(file.metadata, str(path), prefix="general.sampling.")),
    )


def _open_directory(path: Path, name: str) -> ModelImage:
    config = read_object(path / "config.json")
    if config is None:
        inside = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; give one of its files, such as {inside[0]}" if inside else ""
        raise FormatError(f"{path}: not a model: the directory has no config.json{hint}")
    fields = Fields(config, str(path / "config.json"))
    weights = HfWeights(read_directory(path), hf_family(fields), str(path))
    hyperparameters = hf_architecture(fields, has_head="output.weight" in weights)
    # transformers ignores a head that is stored although it is tied to the embedding
    check_tensors(weights.shapes(), hyperparameters, str(path), ignored=frozenset({"output.weight"}))
    generation = read_object(path / "generation_config.json") or {}
    return ModelImage(
        name=name,
        path=path,
        hyperparameters=hyperparameters,
        weights=weights,
        tokenizer=tokenizer_from_directory(path),
        template=_directory_template(path),
        sampling_defaults=sampling_from_directory(Fields(generation, str(path / "generation_config.json"))),
    )


def _directory_template(path: Path) -> str | None:
    """`chat_template.jinja`, else what tokenizer_config.json has: a template, or several, one of them "default"."""
    template: Any = read_text(path / "chat_template.jinja")
    if template is None:
        template = (read_object(path / "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise FormatError(f"{path / 'tokenizer_config.json'}: chat_template must be a string or a list of named ones")
    return template
