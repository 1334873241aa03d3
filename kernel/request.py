"""What goes in and what comes out: the structs that cross the kernel's walls. No behaviour beyond checking fields."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from llm_os.kernel.errors import RequestError
from llm_os.kernel.grammar import Grammar
from llm_os.kernel.strict import Strict

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


def _in_range(field: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:  # NaN fails the comparison too
        raise RequestError(f"{field} is {value}; it must be from {low} to {high}")


class Sampling(Strict, frozen=True, kw_only=True):
    """How an answer is sampled. None means: what the model recommends, else the value in brackets.

    Raises RequestError for an unknown field, a wrong type or a value out of range.
    """

    error = RequestError

    max_tokens: int | None = None  # [as many as the context allows]
    temperature: float | None = None  # [0.7]; 0 is greedy
    top_k: int | None = None  # [0, off]
    top_p: float | None = None  # [1.0]
    min_p: float | None = None  # [0.0]
    repetition_penalty: float | None = None  # [1.0]; over prompt and answer, CTRL (Keskar et al. 2019)
    presence_penalty: float = 0.0  # over the answer, as in OpenAI's API
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # None draws one; Completion.seed says which
    stop: tuple[str, ...] = ()  # strings that end the answer and are not part of it
    logprobs: int | None = None  # report log-probabilities, with this many alternatives (0-20)
    grammar: Grammar | None = None  # what the answer matches, if it is not cut short: by max_tokens, a stop string, …

    def __post_init__(self) -> None:
        _in_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _in_range("temperature", self.temperature, 0, 100)
        _in_range("top_k", self.top_k, 0, 2**31 - 1)
        _in_range("top_p", self.top_p, 0, 1)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _in_range("presence_penalty", self.presence_penalty, -100, 100)
        _in_range("frequency_penalty", self.frequency_penalty, -100, 100)
        _in_range("seed", self.seed, 0, 2**64 - 1)
        _in_range("logprobs", self.logprobs, 0, 20)
        for token, bias in self.logit_bias.items():
            _in_range("logit_bias token", token, 0, 2**31 - 1)
            _in_range(f"logit_bias of token {token}", bias, -1000, 1000)
        if len(self.stop) > 16:
            raise RequestError(f"stop has {len(self.stop)} strings; the limit is 16")
        for string in self.stop:
            if not 0 < len(string) <= 1024:
                raise RequestError(f"a stop string has {len(string)} characters; it must have 1 to 1024")


class SamplingDefaults(Struct, frozen=True, kw_only=True):
    """A model's own recommendation; None where it has none."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class Request(Strict, frozen=True, kw_only=True):
    """One question to one model: either `messages` (through the model's chat template) or a raw `prompt`.

    Raises RequestError when neither or both are given, and as Sampling does.
    """

    error = RequestError

    model: str
    messages: list[dict[str, Any]] | None = None  # {"role": ..., "content": ...}
    tools: tuple[dict[str, Any], ...] = ()  # what the model may ask for: OpenAI's function definitions
    prompt: str | list[int] | None = None  # text or token ids, continued as they stand
    sampling: Sampling = Sampling()
    nice: int = 0  # -20 (first) to 19 (last)
    tenant: str = ""  # who asks, as the host has authenticated it
    queue_s: float | None = None  # refuse it unless it runs for the first time within so many seconds
    deadline_s: float | None = None  # end it after so many seconds, with what there is by then
    hold: bool = False  # after a turn it waits, BLOCKED, for `unblock` or `finish`; max_tokens is of all turns together

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise RequestError("give either messages (chat) or prompt (raw text), not both and not neither")
        if self.tools and self.messages is None:
            raise RequestError("tools go through the chat template; give messages, or write them into the prompt")
        _in_range("nice", self.nice, -20, 19)
        _in_range("queue_s", self.queue_s, 0, 1e9)
        _in_range("deadline_s", self.deadline_s, 0, 1e9)


class TokenLogprob(Struct, frozen=True):
    """Log-probability of one chosen token, and the most likely alternatives as (token id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Chunk(Struct, frozen=True, kw_only=True):
    """A piece of an answer. `text` never ends in half a character; `finish_reason` is set on the last one."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    waiting: bool = False  # its turn is over, and it is held (`Request.hold`)


class Usage(Struct, frozen=True, kw_only=True):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt: their KV was there already
    drafted_tokens: int = 0  # guesses of the answer that were checked (`Config.speculation`), and of these
    accepted_tokens: int = 0  # those that were right: each of them saved a step


class Timings(Struct, frozen=True, kw_only=True):
    """Seconds and tokens per second, as the kernel's clock saw them."""

    load_s: float  # loading the model, 0 when it was there
    ttft_s: float  # from admission (the model being there) to the first token
    prefill_tok_s: float
    decode_tok_s: float


class Completion(Struct, frozen=True, kw_only=True):
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    logprobs: tuple[TokenLogprob, ...] = ()
