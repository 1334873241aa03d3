"""What the kernel knows of a model: sizes, limits and a tokenizer. Not: tensors, files, architectures.

An *image* is to a model what an executable file is to a process: opened from disk, immutable, shared by every process
that runs it. `drivers/formats/` implements it for model files; the `sim` driver brings one without any file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llm_os.kernel.request import SamplingDefaults


class TextDecoder(Protocol):
    """Turns one process's tokens into text, incrementally. Holds state: one per process."""

    def push(self, token_id: int) -> str:
        """Text that became complete with this token: possibly "", never half a character."""
        ...

    def flush(self) -> str:
        """What is still held back at the end, with undecodable bytes replaced by U+FFFD."""
        ...


class Image(Protocol):
    """A model as the kernel sees it. Thread-safe and immutable; `close()` releases the file behind it."""

    @property
    def name(self) -> str:
        """What people call it, for listings and errors."""
        ...

    @property
    def architecture(self) -> str:
        """Family name, for listings: "llama", "qwen3", ..."""
        ...

    @property
    def context_length(self) -> int:
        """The most tokens that prompt and answer may have together."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def turn_end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer in a chat (the end of turn, and the end of text)."""
        ...

    @property
    def text_end_tokens(self) -> frozenset[int]:
        """Tokens that end a raw completion: only the end of text; turn markers mean nothing there."""
        ...

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """What the model's authors recommend (`generation_config.json`)."""
        ...

    def encode(self, text: str, *, raw: bool) -> list[int]:
        """Token ids of `text`.

        `raw=True` is user text continued as it stands: a beginning-of-text token is added if the model asks for it, and
        text that looks like a special token stays text. `raw=False` is the output of `render_chat`: special tokens are
        recognised and nothing is added twice.
        """
        ...

    def token_bytes(self) -> Sequence[bytes]:
        """What each token of the vocabulary says, by id: `vocab_size` of them, b"" for one that is no text (an end, a
        marker). The same object each time, for who keeps something by vocabulary."""
        ...

    def decoder(self) -> TextDecoder:
        """A fresh streaming decoder."""
        ...

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt text for a conversation, ready for the assistant's turn. `tools` are those that it may ask for, as
        OpenAI's function definitions; a template that knows no tools leaves them out.

        Raises RequestError when the model has no template or the template refuses the messages, FormatError when the
        template is broken, hostile, or exceeds its time or size limit.
        """
        ...

    def fresh(self) -> bool:
        """Whether the files behind it are still those that it was opened from. Reads no contents."""
        ...

    def close(self) -> None:
        """Releases mappings and handles. Idempotent. Calls after it raise Closed."""
        ...
