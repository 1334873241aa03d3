"""The judge of shares: who is served more than another that waits, beyond the bound and not within it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from llm_os.drivers.sim import SimImage
from llm_os.drivers.simulation.chooser import Chooser
from llm_os.drivers.simulation.plan import draw
from llm_os.drivers.simulation.shares import Shares
from llm_os.drivers.simulation.story import Story
from llm_os.drivers.simulation.violation import Violation
from llm_os.kernel.config import Tenant
from llm_os.kernel.driver import Sequence
from llm_os.kernel.request import Request, Sampling

IMAGE = SimImage.parse("sim:a")
PROMPT, ANSWER = 3, 5
U = 1 * (1 + 1) * PROMPT + 2 * 1 * ANSWER  # with a batch of one


def feeding(story: Story) -> Sequence:
    return Sequence(pid=story.pid, salt=0, tokens=(1,) * PROMPT, position=0, pages=(0,), sample=None)


class Backlog:
    """Two tenants, each with four requests waiting, on a machine whose batches have one row."""

    def __init__(self, **changes: Any) -> None:
        plan = draw(Chooser(1))
        config = structs.replace(
            plan.config, batch_size=1, tenants={"one": Tenant(weight=1.0), "other": Tenant(weight=3.0)}
        )
        plan = structs.replace(plan, config=config, tenants=("one", "other"), backlog=3, **changes)
        self.shares = Shares(plan)
        self.stories: list[Story] = []
        for tenant in plan.tenants * 4:
            self.come(tenant)
        self.step()
        self.step()

    def come(self, tenant: str, **fields: Any) -> Story:
        request = Request(model="sim:a", prompt="abc", tenant=tenant, sampling=Sampling(max_tokens=ANSWER), **fields)
        story = Story(len(self.stories), request, 0, 0, IMAGE, [1] * PROMPT)
        story.ready = 0.0
        self.stories.append(story)
        return story

    def step(self) -> None:
        self.shares.stepped([story for story in self.stories if story.ended is None])

    def serve(self, tenant: str) -> Story:
        """One whole request, step by step, and another comes."""
        story = next(s for s in self.stories if s.request.tenant == tenant and s.ended is None and not s.ran_first)
        self.come(tenant)
        self.step()
        story.ran_first = True
        self.shares.fed(story, feeding(story))
        for _ in range(ANSWER):
            self.shares.answered(story, 1)
            self.step()
        story.ended = "length"
        self.shares.ended(story)
        self.step()
        return story


def test_who_is_served_alone_while_another_waits_is_found() -> None:
    backlog = Backlog()
    with pytest.raises(Violation, match=r"share: 'one' was served 22 more than 'other'; 21.3333 is the bound"):
        for _ in range(8):
            backlog.serve("one")
    assert U + U / 3 < 22


def test_weights_count() -> None:
    backlog = Backlog()
    for _ in range(12):
        for tenant in ("one", "other", "other", "other"):
            backlog.serve(tenant)
    with pytest.raises(Violation, match="'one' was served"):
        for _ in range(12):
            backlog.serve("one")
            backlog.serve("other")


def test_who_does_not_wait_may_be_served_less() -> None:
    backlog = Backlog()
    for story in backlog.stories[3::2]:
        story.killed = True
    for _ in range(12):
        backlog.serve("one")


def test_a_prompt_that_is_computed_again_is_no_service() -> None:
    backlog = Backlog()
    story = backlog.serve("one")
    for _ in range(100):
        backlog.shares.fed(story, feeding(story))
        backlog.step()


def test_tenants_of_several_classes_are_not_compared() -> None:
    backlog = Backlog()
    backlog.come("one", nice=-5)
    for _ in range(12):
        backlog.serve("one")


def test_machines_without_a_backlog_are_not_judged() -> None:
    plan = draw(Chooser(1))
    assert plan.backlog == 0
    shares = Shares(plan)
    story = Story(1, Request(model="sim:a", prompt="a", tenant=plan.tenants[0]), 0, 0, IMAGE, [1])
    for _ in range(1000):
        shares.answered(story, 1)
        shares.stepped([story])
