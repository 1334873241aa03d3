"""What one process should do, known without looking into the kernel: its context, its answer, and how it may end.

The tokens that the core knows are those that it was given: the prompt, what rows of batches answered, what a tool said.
Each is compared with the lone reference as it comes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_os.drivers.sim import Lone, SimImage
from llm_os.drivers.simulation.violation import insist
from llm_os.kernel.driver import RowError, Sampled
from llm_os.kernel.driver import Sequence as Rows
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
    context: list[int] = field(default_factory=list)  # what the core knows
    answer: list[int] = field(default_factory=list)  # of it, what was generated
    delivered: int = 0  # of the answer
    inherited: int = 0
    durable: int = 0
    text: list[str] = field(default_factory=list)
    ended: str | None = None
    killed: bool = False
    excused: str | None = None  # the fault that may end it with an error
    lone: Lone | None = None
    submitted: float = 0.0
    blocked: bool = False
    slow: bool = False
    gone: bool = False  # its reader
    deadline: float | None = None
    progress: int = 0  # the step of its last token

    def __post_init__(self) -> None:
        self.context = self.context or list(self.prompt)

    # -- what the device is asked and answers ------------------------------------------------------------------------

    def fed(self, rows: Rows) -> None:
        """A batch is issued with this row."""
        start, end = rows.position, rows.position + len(rows.tokens)
        insist(self.ended is None and not self.killed, "one end", f"process {self.pid} runs after its end")
        insist(not self.blocked, "blocked", f"process {self.pid} runs while it waits for a tool")
        if self.parent is not None:
            if rows.sample is None:
                source = self.origin.context
                insist(tuple(source[start:end]) == rows.tokens, "context", f"of fork {self.pid} is not its parent's")
                return
            self.adopt(end)
        insist(tuple(self.context[start:end]) == rows.tokens, "context", f"process {self.pid} is fed other tokens")
        insist(
            (rows.sample is not None) == (end == len(self.context)), "context", f"process {self.pid} samples at {end}"
        )
        insist(rows.salt == self.salt, "tenant", f"process {self.pid} runs with another salt")
        if rows.sample is not None and rows.sample.temperature > 0:
            expected = uniform(self.seed, len(self.context))
            insist(rows.sample.uniform == expected, "randomness", f"of process {self.pid} at {len(self.context)}")

    def ran(self, rows: Rows, row: object) -> None:
        """The core is told this answer to a row."""
        if rows.sample is None or isinstance(row, RowError) or self.parent is not None:
            return
        insist(isinstance(row, Sampled), "row", row)
        assert isinstance(row, Sampled)
        if rows.position + len(rows.tokens) != len(self.context):
            return  # a batch of an earlier life
        if self.lone is None:
            self.lone = Lone(self.image, self.salt)
        for position in range(self.lone.fed, len(self.context)):
            self.lone.feed(self.context[position])
        expected = self.lone.next(rows.sample)
        insist(row.token == expected, "token", f"process {self.pid} read a cell that is not its own")
        self.context.append(row.token)
        self.answer.append(row.token)

    # -- forks -------------------------------------------------------------------------------------------------------

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
        taken = length - len(self.prompt)
        insist(taken >= 0 and length <= len(source.context), "fork", f"{self.pid} knows more than its parent")
        self.context = source.context[:length]
        self.answer = self.context[len(self.prompt) :]
        self.inherited = self.delivered = taken
        self.parent = None

    # -- what the reader gets ----------------------------------------------------------------------------------------

    def read(self, tokens: tuple[int, ...], text: str) -> None:
        insist(self.ended is None, "one end", f"process {self.pid} goes on after its end")
        at, end = self.delivered, self.delivered + len(tokens)
        if tokens:
            insist(self.parent is None, "stream", f"fork {self.pid} answers before it ran")
            insist(tuple(self.answer[at:end]) == tokens, "stream", f"of process {self.pid} is not the reference")
        self.delivered = end
        self.text.append(text)

    def finish(self, completion: Completion, now: float) -> None:
        insist(self.ended is None, "one end", f"process {self.pid} ends twice")
        self.ended = reason = str(completion.finish_reason)
        if self.parent is not None:
            self.adopt(len(self.prompt) + len(completion.token_ids))
        took, most = self.answer, self.request.sampling.max_tokens
        room = self.image.context_length - len(self.prompt)
        got = list(completion.token_ids)
        insist(got == took[: len(got)], "stream", f"the completion of {self.pid} is not the reference")
        insist(len(got) == self.delivered, "stream", f"{self.pid} was delivered {self.delivered} tokens of {len(got)}")
        insist(completion.seed == self.seed, "seed", self.pid)
        usage = completion.usage
        known = usage.prompt_tokens in ((len(self.prompt), 0) if not got else (len(self.prompt),))  # 0: not yet encoded
        insist(known and usage.completion_tokens == len(got), "usage", f"of {self.pid} is {usage}")
        if reason == "stop":
            insist(got and got[-1] == END, "end", f"{self.pid} stopped without an end")
        elif reason == "length":
            insist(len(got) == min(most or room, room) or most is None, "end", f"{self.pid} is too short: {len(got)}")
        elif reason == "cancelled":
            insist(self.killed, "end", f"{self.pid} was cancelled by nobody")
        elif reason == "deadline":
            insist(self.deadline is not None and now >= self.deadline, "end", f"deadline of {self.pid} had not come")
        else:
            insist(False, "end", f"{self.pid} ended with {reason}")
        if reason in ("stop", "length"):
            insist(len(got) == len(took), "end", f"{self.pid} ended with {len(got)} of {len(took)} tokens")
        if not self.inherited:
            expected = "".join(chr(token) for token in got if token != END)
            insist(completion.text == expected == "".join(self.text), "text", f"of {self.pid}: {completion.text!r}")
