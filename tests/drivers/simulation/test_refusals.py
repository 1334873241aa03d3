"""Refusals that are wrong beyond doubt are found, and those that may be right are not."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from llm_os.drivers.sim import SimImage
from llm_os.drivers.simulation.chooser import Chooser
from llm_os.drivers.simulation.plan import draw
from llm_os.drivers.simulation.refusals import check_refusal
from llm_os.drivers.simulation.story import Story
from llm_os.drivers.simulation.violation import Violation
from llm_os.kernel.config import Tenant
from llm_os.kernel.request import Request, Sampling

FULL = "memory is full after 9 tokens; lower max_tokens, unload a model or raise memory"
SIZE = "a needs 9 KiB for weights; unpin a model or raise memory"
ROOM = "3 prompt tokens and 5 more need 4 KiB of KV; 0 bytes are left beside the weights"
QUEUE = "9 processes are live, the most that queue_limit allows; try again in 1 s"
LATE = "it waited 1 s and has not run; queue_s allows 1 s; try again later"
QUOTA = "tenant 'a' has 1 of its 9 tokens left; the request needs 4"


def check(message: str, *, live: int = 50, fixed: bool = False, max_tokens: int | None = 5, **limits: Any) -> None:
    plan = draw(Chooser(1))
    config = structs.replace(plan.config, memory=1 << 20, queue_limit=9, tenants={"a": Tenant(**limits)})
    request = Request(model="sim:a", prompt="abc", tenant="a", sampling=Sampling(max_tokens=max_tokens))
    image = SimImage.parse("sim:a?layers=1&layer_bytes=4096&kv_bytes_per_token=64")
    story = Story(1, request, 0, 0, image, [1, 2, 3])
    story.patience = 5.0
    check_refusal(structs.replace(plan, config=config), story, message, live=live, fixed=fixed, now=4.0)


@pytest.mark.parametrize(
    ("message", "facts"),
    [(FULL, {}), (SIZE, {}), (ROOM, {}), (QUEUE, {"live": 8}), (LATE, {}), (QUOTA, {})],
    ids=["full", "size", "room", "queue", "late", "quota"],
)
def test_a_refusal_without_reason_is_found(message, facts):
    with pytest.raises(Violation, match="refused without reason"):
        check(message, **facts)


@pytest.mark.parametrize(
    ("message", "facts"),
    [
        (FULL, {"fixed": True}),
        (FULL, {"max_tokens": None}),
        (SIZE, {"fixed": True}),
        (ROOM, {"max_tokens": 100_000}),
        (QUEUE, {"live": 9}),
        (QUOTA, {"max_tokens": 5, "max_pages": 3}),
        ("something else", {}),
    ],
)
def test_a_refusal_that_may_be_right_is_let_be(message, facts):
    check(message, **facts)
