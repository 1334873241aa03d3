"""A process is one request on its way: tokens, pages, sampling state. It never leaves the kernel; ProcessInfo does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from llm_os.kernel.accounting import Reservation
from llm_os.kernel.constraint import Compiled, Constraint
from llm_os.kernel.driver import Guess, Sample, Sampled
from llm_os.kernel.errors import ModelError, RequestError
from llm_os.kernel.image import Image, TextDecoder
from llm_os.kernel.journal import Given, Took
from llm_os.kernel.page_table import PageTable
from llm_os.kernel.random import uniform
from llm_os.kernel.request import Chunk, Completion, FinishReason, Request, Timings, TokenLogprob, Usage
from llm_os.kernel.stop_strings import StopStrings

if TYPE_CHECKING:
    from llm_os.kernel.drafting import Guesser


class State(StrEnum):
    """NEW -> READY <-> RUNNING, READY <-> BLOCKED; an end from anywhere, and then the process is gone from the table.

    `ps` shows a READY process as LOADING while its model's weights are on their way, and as SWAPPED while pages of it
    are in swap. An ended process that an operation in flight still names is a zombie: it keeps its pages until then.
    """

    NEW = "new"  # its model file is being opened, its text tokenized
    READY = "ready"
    RUNNING = "running"  # in a batch that is in flight
    BLOCKED = "blocked"  # waits for what a tool says
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
    drafted_tokens: int = 0  # guessed and checked (`Config.speculation`), and of these
    accepted_tokens: int = 0  # right


@dataclass(eq=False, slots=True)
class Process:
    """Mutable state, owned by the core; `pid` grows with arrival."""

    pid: int
    request: Request
    seed: int
    submitted: float
    parent: int | None = None
    nice: int = 0
    restored: bool = False  # it began in an earlier life of the kernel
    state: State = State.NEW
    salt: int = field(init=False)  # what sets its tenant's pages apart from all others'
    reservation: Reservation | None = None
    image: Image | None = None
    # what it says
    tokens: list[int] = field(default_factory=list)  # prompt, then what was generated and given, in order
    prompt_tokens: int = 0
    generated: list[int] = field(default_factory=list)
    given: list[tuple[int, int]] = field(default_factory=list)  # (start, count) in `tokens` of what it was given
    max_tokens: int = 0  # of the answer
    end_tokens: frozenset[int] = frozenset()
    decoder: TextDecoder | None = None
    stops: StopStrings = field(default_factory=lambda: StopStrings(()))
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    base: Sample | None = None  # how it samples, but for what changes from token to token
    compiled: Compiled | None = None  # the grammar of its answer, if there is one
    constraint: Constraint | None = None
    turn: int = 0  # where in `generated` the present answer begins: after the last token that ended one
    said: str = ""  # by its parent, and not yet told to filters
    inherited: int = 0  # tokens of the answer that its parent, or an earlier life, generated
    forks: list[Process] = field(default_factory=list)  # children that wait for the operation in flight to end
    from_prompt: bool = False  # a child: it continues from its parent's prompt
    holding: bool = False  # its turn is over, and it is to wait for what comes next
    # what it has
    table: PageTable | None = None
    computed: int = 0  # tokens whose KV is in the pages
    cached: int | None = None  # prompt tokens that the prefix cache had
    charged: int = 0  # tokens that it has used of its tenant's quota: computed or generated
    guesser: Guesser | None = None  # once it has been asked for guesses
    drafted: int = 0  # guesses of its answer that were checked, and
    accepted: int = 0  # those that were right
    paid: int = 0  # tokens whose computing its tenant's counter has been charged for
    flights: int = 0  # operations in flight that name its pages
    # how it waits
    active: bool = False  # in the running set
    urgency: int = 0  # its class, with what it gained by waiting; kept while it is active
    seniority: int = 0  # the order of becoming active for the first time; 0 is never
    ran_at: float = 0.0  # when it was last in a batch
    ran: bool = False  # since it became active
    rank: float = 0.0  # its place among those of its tenant, by the policy
    queued: float = 0.0  # since when it waits to run
    waited: float = 0.0  # seconds before that
    blocking: int | None = None  # the ticket to answer when it has stopped
    resumes: float | None = None  # when it is expected to be unblocked
    faulted: float | None = None  # when it began to wait for its model's weights
    admitted: float | None = None  # when it first could run
    first_token: float | None = None

    def __post_init__(self) -> None:
        self.salt = salt_of(self.request.tenant)

    @property
    def remaining(self) -> int:
        """Tokens still to be fed before the next one can be chosen; at least 1 for a live process."""
        return len(self.tokens) - self.computed

    def guesses(self, ids: tuple[int, ...], sample: Sample) -> tuple[Guess, ...]:
        """What may come next, after the token that is chosen by `sample`."""
        found: list[Guess] = []
        for count, token in enumerate(ids, 1):
            sample = self.sample(ids[:count], sample)
            found.append(Guess(token, sample))
        return tuple(found)

    def sample(self, ahead: tuple[int, ...] = (), before: Sample | None = None) -> Sample:
        """How to choose the token at position len(tokens), or the one after `ahead`, if that is what comes; `before` is
        how to choose the last of that."""
        base = self.base
        if base is None:
            base = self.base = self._sample()
        if base.temperature > 0:
            base = structs.replace(base, uniform=uniform(self.seed, len(self.tokens) + len(ahead)))
        if self.constraint is not None:
            answer = (*self.generated[self.turn :], *ahead)
            base = structs.replace(base, mask=self.constraint.mask(answer, before.mask if before else None))
        if base.repetition_penalty != 1.0:
            return structs.replace(base, prompt=tuple(self._context()), output=(*self.generated, *ahead))
        if base.presence_penalty or base.frequency_penalty:
            return structs.replace(base, output=(*self.generated, *ahead))
        return base

    def _sample(self) -> Sample:
        sampling = self.request.sampling
        defaults = self.image.sampling_defaults if self.image else None

        def pick(name: str, fallback: float) -> float:
            value = getattr(sampling, name)
            if value is None:
                value = getattr(defaults, name, None)
            return fallback if value is None else value

        return Sample(
            uniform=0.0,
            temperature=pick("temperature", 0.7),
            top_k=int(pick("top_k", 0)),
            top_p=pick("top_p", 1.0),
            min_p=pick("min_p", 0.0),
            repetition_penalty=pick("repetition_penalty", 1.0),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=tuple(sampling.logit_bias.items()),
            logprobs=sampling.logprobs,
        )

    def _context(self) -> Iterator[int]:
        """Prompt, and what it was given."""
        yield from self.tokens[: self.prompt_tokens]
        for start, count in self.given:
            yield from self.tokens[start : start + count]

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
        self._check_tokens("the prompt", tokens)
        self._check_tokens("logit_bias", sampling.logit_bias)
        self.tokens, self.prompt_tokens = list(tokens), len(tokens)
        self.max_tokens = sampling.max_tokens or room
        chat = self.request.messages is not None
        self.end_tokens = self.image.turn_end_tokens if chat else self.image.text_end_tokens
        self.decoder, self.stops = self.image.decoder(), StopStrings(sampling.stop)
        if self.compiled is not None:
            self.constraint = Constraint(self.compiled, self.image, self.end_tokens)

    def _check_tokens(self, what: str, tokens: Iterable[int]) -> None:
        assert self.image is not None
        size = self.image.vocab_size
        for token in tokens:
            if not (isinstance(token, int) and 0 <= token < size):
                raise RequestError(
                    f"{what} has token id {token}; the vocabulary of {self.image.name} ends at {size - 1}"
                )

    def append(self, sampled: Sampled, now: float) -> Chunk:
        """Take one more token of the answer: what to deliver for it, with a reason if the process ends here."""
        assert self.decoder is not None
        self.tokens.append(sampled.token)
        self.generated.append(sampled.token)
        if self.first_token is None:
            self.first_token = now
        ended = sampled.token in self.end_tokens
        if ended:
            self.turn = len(self.generated)
        full = len(self.generated) >= self.max_tokens
        text = "" if ended else self.stops.push(_text(self.decoder.push(sampled.token)))
        if (ended or full) and not self.stops.hit:
            text += self.stops.push(_text(self.decoder.flush())) + self.stops.flush()
        self.holding = ended and self.request.hold and not full and not self.stops.hit
        reason: FinishReason | None = None
        if (ended and not self.holding) or self.stops.hit:
            reason = "stop"
        elif full:
            reason = "length"
        self.text.append(text)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampled.logprob is not None:
            logprobs = (TokenLogprob(sampled.token, sampled.logprob, sampled.top),)
            self.logprobs.extend(logprobs)
        return Chunk(
            text=text, token_ids=(sampled.token,), logprobs=logprobs, finish_reason=reason, waiting=self.holding
        )

    def check_gift(self, tokens: tuple[int, ...]) -> None:
        """Raises RequestError for tokens that it cannot be given."""
        assert self.image is not None
        self._check_tokens("what unblock gives", tokens)
        room = self.image.context_length - len(self.tokens) - 1
        if len(tokens) > room:
            raise RequestError(
                f"process {self.pid} is given {len(tokens)} tokens; its context of {self.image.context_length} has "
                f"room for {max(0, room)}"
            )

    def give(self, tokens: tuple[int, ...]) -> None:
        """Tokens that it did not generate become part of its context."""
        assert self.image is not None
        if tokens or self.holding:
            self.given.append((len(self.tokens), len(tokens)))
            self.tokens += tokens
        self.holding = False
        room = self.image.context_length - len(self.tokens)
        self.max_tokens = min(self.max_tokens, len(self.generated) + room)

    def recede(self, computed: int) -> None:
        """The KV from position `computed` on is there no more."""
        self.computed = min(self.computed, computed)
        if self.admitted is None and self.cached is not None:
            self.cached = min(self.cached, computed)

    def foreign(self, start: int, end: int) -> int:
        """How many of the tokens from `start` to `end` it did not generate."""
        spans = ((0, self.prompt_tokens), *self.given)
        return sum(max(0, min(end, first + count) - max(start, first)) for first, count in spans)

    def flush(self) -> str:
        """Text that was held back; the process ends before it could become a stop string or a whole character."""
        text = self.stops.flush()
        self.text.append(text)
        return text

    def history(self) -> list[Took | Given]:
        """What it took and was given since its prompt, as the journal has it."""
        records: list[Took | Given] = []
        taken = at = 0
        logprobs = tuple((entry.logprob, entry.top) for entry in self.logprobs)
        for start, count in (*((s - self.prompt_tokens, n) for s, n in self.given), (self._said, None)):
            if start > at:
                end = taken + start - at
                records.append(Took(self.pid, tuple(self.generated[taken:end]), logprobs[taken:end]))
                taken = end
            if count is not None:
                begin = self.prompt_tokens + start
                records.append(Given(self.pid, tuple(self.tokens[begin : begin + count])))
                at = start + count
        return records

    @property
    def _said(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    def replay(self, records: Iterable[Took | Given], now: float) -> Chunk | None:
        """Take again what another process, or this one in an earlier life, took: all of it as one chunk."""
        chunks: list[Chunk] = []
        for record in records:
            if isinstance(record, Given):
                self.give(record.tokens)
                continue
            for index, token in enumerate(record.tokens):
                chunks.append(self.append(Sampled(token, *(record.logprobs[index] if record.logprobs else ())), now))
        self.inherited, self.first_token = len(self.generated), None
        return structs.replace(joined(chunks), waiting=False) if chunks else None

    def completion(self, reason: FinishReason, now: float) -> Completion:
        admitted = now if self.admitted is None else self.admitted
        first = now if self.first_token is None else self.first_token
        output = len(self.generated)
        return Completion(
            text="".join(self.text),
            token_ids=tuple(self.generated),
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=self.prompt_tokens,
                completion_tokens=output,
                cached_tokens=self.cached or 0,
                drafted_tokens=self.drafted,
                accepted_tokens=self.accepted,
            ),
            timings=Timings(
                load_s=0.0 if self.faulted is None else max(0.0, admitted - self.faulted),
                ttft_s=first - admitted,
                prefill_tok_s=_rate(self.prompt_tokens, first - admitted),
                decode_tok_s=_rate(output - self.inherited - 1, now - first),
            ),
            seed=self.seed,
            logprobs=tuple(self.logprobs),
        )

    def info(self, now: float, on_device: bool) -> ProcessInfo:
        state = self.state.value
        if self.state is State.READY and not on_device:
            state = "loading"
        elif self.state is State.READY and self.table is not None and self.table.swapped:
            state = "swapped"
        return ProcessInfo(
            pid=self.pid,
            parent=self.parent,
            tenant=self.request.tenant,
            model=self.request.model,
            state=state,
            nice=self.nice,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.generated),
            computed_tokens=self.computed,
            pages=len(self.table.pages) if self.table else 0,
            age_s=now - self.submitted,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )


def joined(chunks: list[Chunk]) -> Chunk:
    """Chunks that follow each other, as one."""
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        finish_reason=chunks[-1].finish_reason,
        waiting=chunks[-1].waiting,
    )


def _text(piece: object) -> str:
    """What an image's decoder gave, which may be a plugin's."""
    if not isinstance(piece, str):
        raise ModelError(f"the model's decoder gave {type(piece).__name__}, no text")
    return piece


def salt_of(tenant: str) -> int:
    """64 bits that stand for a tenant."""
    return int.from_bytes(hashlib.blake2b(tenant.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0
