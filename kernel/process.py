"""A process is one request on its way: tokens, pages, sampling state. It never leaves the kernel; ProcessInfo does."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import zip_longest

from msgspec import Struct

from llm_os.kernel.driver import Sample, Sampled
from llm_os.kernel.errors import RequestError
from llm_os.kernel.image import Image, TextDecoder
from llm_os.kernel.page_table import PageTable
from llm_os.kernel.random import uniform
from llm_os.kernel.request import Chunk, Completion, FinishReason, Request, Timings, TokenLogprob, Usage
from llm_os.kernel.stop_strings import StopStrings


class State(StrEnum):
    """NEW -> LOADING -> READY <-> RUNNING; an end from anywhere, and then the process is gone from the table."""

    NEW = "new"  # its model file is being opened, its text tokenized
    LOADING = "loading"  # a model fault: the weights are on their way
    READY = "ready"
    RUNNING = "running"  # in a batch or a page copy that is in flight
    ENDED = "ended"


class ProcessInfo(Struct, frozen=True, kw_only=True):
    """One line of `ps`."""

    pid: int
    parent: int | None
    tenant: str
    model: str
    state: str
    nice: int
    prompt_tokens: int
    completion_tokens: int
    computed_tokens: int
    pages: int
    age_s: float


@dataclass(eq=False, slots=True)
class Process:
    """Mutable state, owned by the core; `pid` grows with arrival."""

    pid: int
    request: Request
    seed: int
    submitted: float
    parent: int | None = None
    nice: int = 0
    state: State = State.NEW
    image: Image | None = None
    tokens: list[int] = field(default_factory=list)  # prompt, then answer
    prompt_tokens: int = 0
    max_tokens: int = 0
    computed: int = 0  # tokens whose KV is in the pages
    table: PageTable | None = None
    end_tokens: frozenset[int] = frozenset()
    decoder: TextDecoder | None = None
    stops: StopStrings = field(default_factory=lambda: StopStrings(()))
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    faulted: float | None = None  # when it began to wait for its model's weights
    admitted: float | None = None  # when it first could run
    first_token: float | None = None
    inherited: int = 0  # tokens of the answer that its parent generated
    forks: list[Process] = field(default_factory=list)  # children that wait for the operation in flight to end

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def remaining(self) -> int:
        """Tokens still to be fed before the next one can be chosen; at least 1 for a live process."""
        return len(self.tokens) - self.computed

    @property
    def salt(self) -> int:
        """What sets this tenant's pages apart from all others'."""
        return zlib.crc32(self.request.tenant.encode(errors="surrogatepass"))

    def sample(self) -> Sample:
        """How to choose the token at position len(tokens)."""
        sampling = self.request.sampling
        defaults = self.image.sampling_defaults if self.image else None

        def pick(name: str, fallback: float) -> float:
            value = getattr(sampling, name)
            if value is None:
                value = getattr(defaults, name, None)
            return fallback if value is None else value

        repetition = pick("repetition_penalty", 1.0)
        counts = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0 or repetition != 1.0
        return Sample(
            uniform=uniform(self.seed, len(self.tokens)),
            temperature=pick("temperature", 0.7),
            top_k=int(pick("top_k", 0)),
            top_p=pick("top_p", 1.0),
            min_p=pick("min_p", 0.0),
            repetition_penalty=repetition,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=tuple(sampling.logit_bias.items()),
            prompt=tuple(self.tokens[: self.prompt_tokens]) if repetition != 1.0 else (),
            output=tuple(self.output) if counts else (),
            logprobs=sampling.logprobs,
        )

    def admit(self, tokens: list[int]) -> None:
        """Take the tokens of the prompt. Raises RequestError where they do not fit the model."""
        assert self.image is not None
        sampling, context = self.request.sampling, self.image.context_length
        if not tokens:
            raise RequestError("the prompt is empty; give at least one token of text")
        room = context - len(tokens)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, the context of {self.image.name} is {context}; shorten it"
            )
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise RequestError(
                f"max_tokens is {sampling.max_tokens}; after {len(tokens)} prompt tokens the context of "
                f"{self.image.name} ({context}) leaves at most {room}"
            )
        for name, ids in (("the prompt", tokens), ("logit_bias", sampling.logit_bias)):
            for token in ids:
                if not (isinstance(token, int) and 0 <= token < self.image.vocab_size):
                    raise RequestError(
                        f"{name} has token id {token}; the vocabulary of {self.image.name} ends at "
                        f"{self.image.vocab_size - 1}"
                    )
        self.tokens, self.prompt_tokens = tokens, len(tokens)
        self.max_tokens = sampling.max_tokens or room
        chat = self.request.messages is not None
        self.end_tokens = self.image.turn_end_tokens if chat else self.image.text_end_tokens
        self.decoder, self.stops = self.image.decoder(), StopStrings(sampling.stop)

    def append(self, sampled: Sampled, now: float) -> Chunk:
        """Take one more token of the answer: what to deliver for it, with a reason if the process ends here."""
        assert self.decoder is not None
        self.tokens.append(sampled.token)
        if self.first_token is None:
            self.first_token = now
        ended = sampled.token in self.end_tokens
        text = "" if ended else self.stops.push(self.decoder.push(sampled.token))
        reason: FinishReason | None = None
        if ended or self.stops.hit:
            reason = "stop"
        elif len(self.tokens) - self.prompt_tokens >= self.max_tokens:
            reason = "length"
        if reason and not self.stops.hit:
            text += self.stops.push(self.decoder.flush()) + self.stops.flush()
        self.text.append(text)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampled.logprob is not None:
            logprobs = (TokenLogprob(sampled.token, sampled.logprob, sampled.top),)
            self.logprobs.extend(logprobs)
        return Chunk(text=text, token_ids=(sampled.token,), logprobs=logprobs, finish_reason=reason)

    def flush(self) -> str:
        """Text that was held back; the process ends before it could become a stop string or a whole character."""
        text = self.stops.flush()
        self.text.append(text)
        return text

    def branch(self, child: Process, now: float) -> None:
        """Let a new process share the pages and continue from here. Not while a batch writes them."""
        assert self.table is not None and self.image is not None
        child.image = self.image
        child.admit(self.tokens[: self.prompt_tokens])
        for token, logprob in zip_longest(self.output, self.logprobs):
            child.append(Sampled(token, *((logprob.logprob, logprob.top) if logprob else ())), now)
        child.inherited = len(self.output)
        child.state, child.admitted, child.first_token = State.READY, now, None
        child.computed, child.table = self.computed, self.table.fork(self.computed)

    def completion(self, reason: FinishReason, now: float) -> Completion:
        admitted = now if self.admitted is None else self.admitted
        first = now if self.first_token is None else self.first_token
        output = len(self.output)
        return Completion(
            text="".join(self.text),
            token_ids=tuple(self.output),
            finish_reason=reason,
            usage=Usage(prompt_tokens=self.prompt_tokens, completion_tokens=output),
            timings=Timings(
                load_s=0.0 if self.faulted is None else admitted - self.faulted,
                ttft_s=first - admitted,
                prefill_tok_s=_rate(self.prompt_tokens, first - admitted),
                decode_tok_s=_rate(output - self.inherited - 1, now - first),
            ),
            seed=self.seed,
            logprobs=tuple(self.logprobs),
        )

    def info(self, now: float) -> ProcessInfo:
        return ProcessInfo(
            pid=self.pid,
            parent=self.parent,
            tenant=self.request.tenant,
            model=self.request.model,
            state=self.state.value,
            nice=self.nice,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.output),
            computed_tokens=self.computed,
            pages=len(self.table.pages) if self.table else 0,
            age_s=now - self.submitted,
        )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0
