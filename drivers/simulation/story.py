"""What one process should do, known without looking into the kernel: its context, its answer, and how it may end.

The tokens that the core knows are those that it was told: the prompt, what rows of batches answered, what a tool said.
Each is compared with the lone reference as it comes.

    context  | prompt | answer ...... | given | answer ... |      delivered: how much of the answer its reader has
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_os.drivers.sim import Lone, SimImage
from llm_os.drivers.simulation.violation import insist
from llm_os.kernel.driver import RowError, Sample, Sampled
from llm_os.kernel.driver import Sequence as Rows
from llm_os.kernel.journal import Blocked, Session, Took
from llm_os.kernel.random import uniform
from llm_os.kernel.request import Completion, Request

END = 256


@dataclass(eq=False, slots=True)
class Story:
    """One process as its reader and the device see it."""

    pid: int
    request: Request
    seed: int
    salt: int
    image: SimImage
    prompt: list[int]
    parent: Story | None = None  # until it is known how much of the parent's answer it took over
    forked: bool = False
    # what the core knows
    context: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    given: list[tuple[int, int]] = field(default_factory=list)  # (start, count) in the context
    gift: tuple[int, ...] | None = None  # offered; nobody knows yet whether it was taken
    inherited: int = 0  # tokens of the answer from its parent or an earlier life
    lone: Lone | None = None
    # what the reader knows
    delivered: int = 0  # of the answer; a fork gets what is new, a later life everything again
    text: list[str] = field(default_factory=list)
    ended: str | None = None
    gone: bool = False
    # why it may end, or wait
    killed: bool = False
    excused: str | None = None  # the fault that may end it with an error
    blocked: bool = False
    deadline: float = float("inf")
    patience: float = float("inf")  # when it is refused unless it has run
    lives: int = 1
    ready: float | None = None  # since when it could run
    ran_first: bool = False
    progress: float = 0.0  # when it last got a token, or began to wait for one

    def __post_init__(self) -> None:
        self.context = list(self.prompt)

    # -- what the device is asked and answers --------------------------------------------------------------------------

    def feed(self, rows: Rows, now: float) -> None:
        """A batch is issued with this row."""
        start, end = rows.position, rows.position + len(rows.tokens)
        insist(self.ended is None and not self.killed, "one end", f"process {self.pid} runs after its end")
        insist(not self.blocked, "blocked", f"process {self.pid} runs while it waits for a tool")
        insist(now <= self.deadline, "deadline", f"process {self.pid} runs at {now} after its deadline {self.deadline}")
        insist(self.ran_first or now <= self.patience, "patience", f"process {self.pid} runs first after its queue_s")
        insist(rows.salt == self.salt, "tenant", f"process {self.pid} runs with another salt")
        self.ran_first = True
        if self.parent is not None:
            if rows.sample is None:
                source = self.origin.context
                insist(tuple(source[start:end]) == rows.tokens, "context", f"of fork {self.pid} is not its parent's")
                return
            self.adopt(end)
        if self.gift is not None and (end > len(self.context) or (end == len(self.context) and rows.sample is None)):
            self.take_gift()
        elif rows.sample is not None:
            self.gift = None
        insist(tuple(self.context[start:end]) == rows.tokens, "context", f"process {self.pid} is fed other tokens")
        last = end == len(self.context)
        insist((rows.sample is not None) == last, "context", f"process {self.pid} samples at {end}")
        if rows.sample is not None and rows.sample.temperature > 0:
            for position, sample in enumerate((rows.sample, *(guess.sample for guess in rows.guesses)), end):
                expected = uniform(self.seed, position)
                insist(sample.uniform == expected, "randomness", f"of process {self.pid} at {position}")
        insist(rows.sample is not None or not rows.guesses, "guess", f"process {self.pid} guesses in its prompt")
        insist(END not in rows.fed[len(rows.tokens) :], "guess", f"process {self.pid} guesses beyond an end")
        most = self.request.sampling.max_tokens
        room = most is None or len(self.answer) + len(rows.guesses) < most
        insist(room or not rows.guesses, "guess", f"process {self.pid} guesses beyond its answer")

    def ran(self, rows: Rows, row: object, now: float) -> int:
        """The core is told this answer to a row. Returns how many tokens it brings."""
        if rows.sample is None or isinstance(row, RowError) or self.parent is not None or self.ended is not None:
            return 0
        insist(isinstance(row, Sampled), "row", row)
        assert isinstance(row, Sampled)
        self._next(row, rows.sample)
        count = 1
        for guess, following in zip(rows.guesses, row.more, strict=False):
            if guess.token != self.context[-1]:
                break
            self._next(following, guess.sample)
            count += 1
        self.progress = now
        return count

    def _next(self, sampled: Sampled, sample: Sample) -> None:
        """One more token of its answer: it must be that of a lone process."""
        if self.lone is None:
            self.lone = Lone(self.image, self.salt)
        for position in range(self.lone.fed, len(self.context)):
            self.lone.feed(self.context[position])
        expected = self.lone.next(sample)
        insist(sampled.token == expected, "token", f"process {self.pid} read a cell that is not its own")
        self.context.append(sampled.token)
        self.answer.append(sampled.token)

    def offer(self, tokens: tuple[int, ...]) -> None:
        """A tool says this, and the process may go on."""
        self.gift, self.blocked = tokens, False

    def take_gift(self) -> None:
        assert self.gift is not None
        if self.gift:
            self.given.append((len(self.context), len(self.gift)))
            self.context += self.gift
        self.gift = None

    # -- forks and later lives -----------------------------------------------------------------------------------------

    @property
    def origin(self) -> Story:
        """The nearest forebear that is known, or itself."""
        story = self
        while story.parent is not None:
            story = story.parent
        return story

    def adopt(self, length: int) -> None:
        """It goes on from the first `length` tokens of its parent's context."""
        source = self.origin
        insist(len(self.prompt) <= length <= len(source.context), "fork", f"{self.pid} knows more than its parent")
        self.context = source.context[:length]
        self.given = [(start, min(count, length - start)) for start, count in source.given if start < length]
        taken = length - len(self.prompt) - sum(count for _, count in self.given)
        self.answer = source.answer[:taken]
        self.inherited = self.delivered = taken
        self.parent = None

    def revive(self, session: Session, now: float) -> None:
        """Another life, from the journal. It must have all that the reader has, and nothing that never was."""
        began, since = session.began, session.since
        insist(list(began.prompt) == self.prompt and began.seed == self.seed, "journal", f"began of {self.pid}")
        insist(began.request == self.request, "journal", f"request of {self.pid}")
        context, answer, given = list(began.prompt), list[int](), list[tuple[int, int]]()
        for record in since:
            if isinstance(record, Blocked):
                continue
            if isinstance(record, Took):
                answer += record.tokens
            else:
                given.append((len(context), len(record.tokens)))
            context += record.tokens
        known = [*self.origin.context, *(self.gift or ())]
        insist(context == known[: len(context)], "journal", f"of {self.pid} has tokens that it never had")
        kept = len(answer) >= self.delivered or self.delivered <= self.inherited
        insist(kept, "durable", f"{self.pid} lost tokens that were delivered")
        self.context, self.answer, self.given = context, answer, given
        self.parent = self.gift = self.lone = self.ended = self.excused = None
        self.delivered = self.inherited = 0
        self.killed, self.text, self.progress, self.ran_first = False, [], now, True
        last = next((r for r in reversed(since) if not isinstance(r, Took) or r.tokens), None)
        self.blocked = isinstance(last, Blocked)
        if self.request.hold and isinstance(last, Took) and last.tokens[-1] == END:
            self.blocked = True
        self.deadline, self.lives = float("inf"), self.lives + 1

    # -- what the reader gets ------------------------------------------------------------------------------------------

    def read(self, tokens: tuple[int, ...], text: str) -> None:
        insist(self.ended is None, "one end", f"process {self.pid} goes on after its end")
        self.text.append(text)
        if not tokens:
            return
        insist(self.parent is None, "stream", f"fork {self.pid} answers before it ran")
        at, self.delivered = self.delivered, self.delivered + len(tokens)
        new = tuple(self.answer[at : self.delivered])
        insist(new == tokens, "stream", f"of process {self.pid} is not the reference")

    def wait(self) -> None:
        """Its reader hears that it is held, unless something has been offered to it that it has not taken yet."""
        insist(self.request.hold, "hold", f"process {self.pid} waits, and nobody asked for that")
        said = self.origin.answer[: self.delivered] if self.parent is None else [END]
        insist(said and said[-1] == END, "hold", f"process {self.pid} waits in the midst of a turn")
        taken = self.parent is None and self.context[-1] != END  # while the journal was being written
        self.blocked = self.gift is None and not taken

    def finish(self, completion: Completion, now: float) -> None:
        insist(self.ended is None, "one end", f"process {self.pid} ends twice")
        self.ended = reason = str(completion.finish_reason)
        got, source = list(completion.token_ids), self.origin.answer
        insist(got == source[: len(got)], "stream", f"the completion of {self.pid} is not the reference")
        delivered = len(got) if self.parent is not None else self.delivered
        insist(len(got) == delivered, "stream", f"{self.pid} was delivered {delivered} tokens of {len(got)}")
        insist(completion.seed == self.seed, "seed", f"of {self.pid}")
        usage = completion.usage
        known = usage.prompt_tokens in ((len(self.prompt),) if got else (len(self.prompt), 0))  # 0: not yet encoded
        insist(known and usage.completion_tokens == len(got), "usage", f"of {self.pid} is {usage}")
        most = self.request.sampling.max_tokens
        room = self.image.context_length - len(self.prompt) - sum(count for _, count in self.given)
        if reason == "stop":
            insist(got and got[-1] == END, "end", f"{self.pid} stopped without an end")
        elif reason == "length":
            insist(most is None or len(got) == min(most, room), "end", f"{self.pid} has {len(got)} tokens")
        elif reason == "cancelled":
            insist(self.killed, "end", f"{self.pid} was cancelled by nobody")
        elif reason == "deadline":
            due = now >= self.deadline or (self.lives > 1 and self.request.deadline_s is not None)
            insist(due, "end", f"the deadline of {self.pid} had not come")
        else:
            insist(False, "end", f"{self.pid} ended with {reason}")
        if reason in ("stop", "length") and self.parent is None:  # a fork that never ran has what its parent had then
            insist(len(got) == len(source), "end", f"{self.pid} ended with {len(got)} of {len(source)} tokens")
        expected = "".join(chr(token) for token in got if token != END)
        insist(completion.text == expected, "text", f"of {self.pid}: {completion.text!r}")
        if not self.inherited and self.parent is None:
            insist("".join(self.text) == expected, "text", f"of {self.pid} in pieces: {self.text}")
