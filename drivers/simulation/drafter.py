"""A drafter that knows what comes next, and says so as often as its process deserves: never, sometimes, mostly, always.

It also guesses too many tokens, ends, and ids that no vocabulary has. Knows stories; nothing of the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

from llm_os.drivers.sim import Lone
from llm_os.drivers.simulation.chooser import Chooser
from llm_os.drivers.simulation.story import Story
from llm_os.kernel.drafter import Draft, DraftContext
from llm_os.kernel.driver import Sample
from llm_os.kernel.random import uniform

_BEYOND = 300  # some tokens that it guesses are in no vocabulary


class SimDrafter:
    """Asked by the core in the midst of a step; what it draws belongs to that turn."""

    def __init__(self, stories: Mapping[int, Story], chooser: Chooser) -> None:
        self._stories = stories
        self._chooser = chooser

    def open(self, context: DraftContext) -> Draft | None:
        quality = self._chooser.below(6)
        return SimDraft(self._stories[context.pid], self._chooser, quality) if quality else None


class SimDraft:
    """Of five tokens that it guesses, about `quality` are right; the others mostly not."""

    def __init__(self, story: Story, chooser: Chooser, quality: int) -> None:
        self._story = story
        self._chooser = chooser
        self._quality = quality
        self._lone = Lone(story.image, story.salt)

    def guess(self, new: Sequence[int], limit: int) -> Sequence[int]:
        for token in new:
            self._lone.feed(token)
        story, lone = self._story, copy(self._lone)
        found: list[int] = []
        for _ in range(self._chooser.below(limit + 2)):
            number = uniform(story.seed, lone.fed)
            token = lone.next(Sample(uniform=number, temperature=story.request.sampling.temperature or 0.0))
            if self._chooser.below(5) >= self._quality:
                token = self._chooser.below(_BEYOND)
            found.append(token)
            lone.feed(token)
        return found
