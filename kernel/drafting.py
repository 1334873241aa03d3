"""Speculative decoding: how many guesses a step checks, and what came of them. Knows no drafter's method, no driver.

    tokens … t | g1 g2 g3       t and its guesses are fed in one row, and a token is chosen after each
               s1 s2 s3 s4      s1 comes after t; if g1 is s1, then s2 comes; … what follows a wrong one is void

(Leviathan et al., ICML 2023, and Chen et al., 2023; here the draft is a point, not a distribution.) Each token is
chosen from its own logits with the number of its own position, as without guesses: so answers are the same to the
token, greedy or sampled. KV of wrong guesses lies beyond what is computed: not read, not shared, and written over.

With `speculation="auto"`, as many guesses are checked as make the batch quicker: expected tokens over expected seconds,
by what this model's batches took (`BatchTimes`), and by how many guesses of each process were right so far. A batch
with a prompt in it checks none. Who guesses badly is asked again after 8 steps, then 16, 32, 64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from llm_os.kernel.config import Config
from llm_os.kernel.constraint import obeyed
from llm_os.kernel.costs import BatchTimes
from llm_os.kernel.drafter import Draft, DraftContext, Drafter
from llm_os.kernel.driver import Batch, Sampled
from llm_os.kernel.driver import Sequence as Rows
from llm_os.kernel.pager import Pager
from llm_os.kernel.process import Process

Planned = Sequence[tuple[Process, int]]  # a batch: processes, each with how many tokens

_GAIN = 1.03  # that a batch with guesses must promise
_KEPT = 0.88  # of what is known of a process's guesses, for each that is checked
_REST, _LONGEST_REST = 8, 64  # steps
_DEAF = 3  # rows in a row of which a driver left the guesses out
_MODELS = 64  # whose times are kept
_ROWS = 256  # of guesses in a batch
_CERTAIN = 0.98  # no process is trusted more


class Guesser:
    """What one process's guesses come from, and how good they were."""

    __slots__ = ("drafts", "ends", "pause", "rest", "right", "told", "tried", "vocabulary")

    def __init__(self, drafts: list[Draft], vocabulary: range, ends: frozenset[int]) -> None:
        self.drafts = drafts
        self.vocabulary = vocabulary
        self.ends = ends
        self.told = [0] * len(drafts)  # tokens of the process that each has seen
        self.right = self.tried = 0.0  # guesses, those of long ago count less
        self.rest = 0  # steps in which it is not asked
        self.pause = _REST

    @property
    def chance(self) -> float:
        """That a guess is right, if those before it are."""
        return min(_CERTAIN, (self.right + 0.5) / (self.tried + 1))

    def checked(self, guesses: int, right: int) -> None:
        tried = min(right + 1, guesses)
        kept: float = _KEPT**tried
        self.right, self.tried = kept * self.right + right, kept * self.tried + tried
        if right == guesses:
            self.pause = _REST

    def useless(self) -> None:
        """Its guesses are not worth their time now. It is asked later; if it was bad, ever later, as if it were new."""
        if self.chance < 0.5:
            self.rest, self.pause = self.pause, min(_LONGEST_REST, 2 * self.pause)
            self.right = self.tried = 0.0
        else:
            self.rest = _REST


class Drafting:
    """The guesses of one device's batches."""

    def __init__(self, config: Config, pager: Pager, drafters: Sequence[Drafter]) -> None:
        self._drafters = drafters if config.speculation != "off" else ()
        self._always = config.speculation == "always"
        self._most = config.draft_tokens
        self._batch_tokens = config.batch_tokens
        self._pager = pager
        self._times: dict[str, BatchTimes] = {}
        self._deaf: Counter[str] = Counter()  # by model: rows whose guesses the driver left out

    # -- before a batch ----------------------------------------------------------------------------------------------

    def guesses(self, model: str, batch: Planned) -> dict[int, tuple[int, ...]]:
        """What the processes of a batch are fed beyond their tokens, by pid, within `batch_tokens`. There are pages for
        it."""
        if not self._drafters or self._deaf[model] >= _DEAF:
            return {}
        rows = sum(count for _, count in batch)
        room = self._batch_tokens - rows
        if room <= 0:
            return {}
        if self._always:
            offers = self._offers(batch, room)
            counts = {process.pid: len(ids) for process, ids in offers.items()}
        else:
            curve = self._curve(model, rows, min(room, self._most * rows, _ROWS)) if rows == len(batch) else None
            if curve is None:
                return {}
            offers = self._offers(batch, room)
            counts = _best(offers, rows, curve)
        found: dict[int, tuple[int, ...]] = {}
        for process, ids in offers.items():
            if count := counts[process.pid]:
                if count := self._house(process, min(count, room)):
                    found[process.pid] = ids[:count]
                    room -= count
            else:
                assert process.guesser is not None
                process.guesser.useless()
        return found

    def _curve(self, model: str, rows: int, more: int) -> list[float] | None:
        """What the batch takes with 0, 1, 2, … guesses. None if not even right ones would make it worth while, or
        nobody knows."""
        times = self._times.get(model)
        curve = None if times is None else times.curve(rows, more)
        if curve is None or not any((rows + n) * curve[0] > _GAIN * rows * taken for n, taken in enumerate(curve)):
            return None
        return curve

    def _offers(self, batch: Planned, room: int) -> dict[Process, tuple[int, ...]]:
        """What the drafters say, of those who choose a token in this batch."""
        offers = {}
        for process, count in batch:
            if count == process.remaining:
                limit = min(self._most, room, process.max_tokens - len(process.generated) - 1)
                if limit > 0 and (ids := self._ask(process, limit)):
                    offers[process] = ids
        return offers

    def _ask(self, process: Process, limit: int) -> tuple[int, ...]:
        guesser = process.guesser
        if guesser is None:
            guesser = process.guesser = self._open(process)
        if guesser.rest and not self._always:
            guesser.rest -= 1
            return ()
        vocabulary, ends = guesser.vocabulary, guesser.ends
        for index, draft in enumerate(guesser.drafts):
            new, guesser.told[index] = process.tokens[guesser.told[index] :], len(process.tokens)
            ids = draft.guess(new, limit)
            for count, token in enumerate(ids):
                if count == limit or token not in vocabulary or token in ends:  # nothing comes after an end
                    ids = ids[:count]
                    break
            if ids:
                return tuple(ids)
        return ()

    def _open(self, process: Process) -> Guesser:
        request, image = process.request, process.image
        assert image is not None
        try:
            vocabulary, ends = range(image.vocab_size), frozenset(process.end_tokens)
        except Exception:  # the image is a plugin's code: its process will fail where it matters
            return Guesser([], range(0), frozenset())
        context = DraftContext(pid=process.pid, tenant=request.tenant, model=request.model, image=image)
        opened = [drafter.open(context) for drafter in self._drafters]
        return Guesser([draft for draft in opened if draft is not None], vocabulary, ends)

    def _house(self, process: Process, count: int) -> int:
        """Pages for so many guesses, from what is free or cached: they take no process's. Returns how many have room.
        The next tokens need the same pages, unless the answer ends."""
        table, have = process.table, len(process.tokens)
        assert table is not None
        missing = table.shortage(process.computed, have + count)
        if missing and self._pager.room_for(table.slab, missing):
            self._pager.add_pages(process, have + count)
        return max(0, min(count, len(table.pages) * table.slab.page_tokens - have))

    # -- after a batch -----------------------------------------------------------------------------------------------

    def measured(self, batch: Batch, seconds: float) -> None:
        """It took so long."""
        sequences = batch.sequences
        if self._drafters and all(fed.sample is not None and len(fed.tokens) == 1 for fed in sequences):
            if batch.model not in self._times and len(self._times) >= _MODELS:
                self._times.clear()
            rows = len(sequences) + sum(len(fed.guesses) for fed in sequences)
            self._times.setdefault(batch.model, BatchTimes()).measured(rows, seconds)

    def chosen(self, model: str, fed: Rows, row: Sampled) -> list[Sampled]:
        """What a row has brought, in order: a token, and one more for each guess that was right."""
        found = chosen(fed, row)
        right = len(found) - 1
        if right:
            self._deaf.pop(model, None)
        elif fed.guesses and fed.guesses[0].token == row.token:  # it was right, and nobody looked
            self._deaf[model] += 1
        return found

    def checked(self, process: Process, guesses: int, right: int) -> None:
        """So many guesses of it were right."""
        process.drafted += guesses
        process.accepted += right
        if process.guesser is not None:
            process.guesser.checked(guesses, right)
        self._pager.trim(process)


def _best(offers: Mapping[Process, tuple[int, ...]], rows: int, curve: list[float]) -> dict[int, int]:
    """How many of each one's guesses to check, so that the batch gets the most tokens a second."""
    values: list[tuple[float, int, int]] = []
    for process, ids in offers.items():
        assert process.guesser is not None
        chance = value = process.guesser.chance
        for n in range(len(ids)):
            values.append((-value, n, process.pid))
            value *= chance
    values.sort()
    tokens, best, most = float(rows), 0, _GAIN * rows / curve[0]
    for n, (value, _, _) in enumerate(values[: len(curve) - 1], 1):
        tokens -= value
        if tokens / curve[n] > most:
            best, most = n, tokens / curve[n]
    counts = dict.fromkeys((process.pid for process in offers), 0)
    for _, _, pid in values[:best]:
        counts[pid] += 1
    return counts


def chosen(fed: Rows, row: Sampled) -> list[Sampled]:
    """The tokens of a row, as far as its guesses were right. One that the driver may not choose is left out with all
    that follows: it is asked for again."""
    found = [row]
    more: object = row.more
    for guess, following in zip(fed.guesses, more if isinstance(more, tuple) else (), strict=False):
        if guess.token != found[-1].token or not isinstance(obeyed(guess.sample, following), Sampled):
            break
        found.append(following)
    return found
