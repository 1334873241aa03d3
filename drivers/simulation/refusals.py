"""Refusals that are wrong beyond doubt, as far as one who stands outside can tell. Knows messages, plans and stories.

A refusal for memory can be right only if the request is too large even alone, or if a model is there to stay: pinned,
or one that the device failed to unload.
"""

from __future__ import annotations

from llm_os.drivers.simulation.plan import FRAME, Plan
from llm_os.drivers.simulation.story import Story
from llm_os.drivers.simulation.violation import insist
from llm_os.kernel.config import Tenant


def check_refusal(plan: Plan, story: Story, message: str, *, live: int, fixed: bool, now: float) -> None:
    """`live` is the most that can have been live; `fixed` whether a model may be there to stay."""
    limits = plan.config.tenants.get(story.request.tenant, Tenant())

    def wrong(if_: bool) -> None:
        insist(not if_, "refusal", f"{story.pid} is refused without reason: {message}")

    if message.startswith("tenant "):
        free = limits.max_processes is None and limits.max_tokens is None and limits.max_pages is None
        wrong(free or ("live processes" in message and limits.max_processes is None))
    elif "queue_limit" in message:
        wrong(live < plan.config.queue_limit)
    elif "queue_s" in message:
        wrong(now < story.patience)
    elif "memory is full" in message:
        promised = story.request.sampling.max_tokens is not None and not story.given and not story.forked
        wrong(promised and not fixed)
    elif "unpin" in message:
        wrong(not fixed)
    elif "more need" in message:
        wrong(not fixed and _fits(plan, story))


def _fits(plan: Plan, story: Story) -> bool:
    """Whether its KV certainly fits beside its model: a frame holds pages of at least half its size."""
    image, most = story.image, story.request.sampling.max_tokens
    tokens = len(story.prompt) + (1 if most is None else most) + 64
    needed = 2 * -(-tokens * image.kv_bytes_per_token // FRAME) + 1
    weights = image.layers * -(-image.layer_bytes // FRAME) + -(-plan.config.batch_tokens * 64 // FRAME)
    memory = plan.config.memory
    return isinstance(memory, int) and needed <= memory // FRAME - weights
