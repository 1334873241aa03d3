"""What is simulated: the options of a run, and the machine that a seed draws: its memory, models, tenants.

Machines are small, so that everything is short of something: a few processes, a few dozen frames, texts of a few pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct, structs

from llm_os.drivers.simulation.chooser import Chooser
from llm_os.kernel.config import Config, Tenant

FRAME = 4096
UNIT = 2.0**-24  # seconds; so short that a swap can be cheaper than computing; sums of whole units are exact
_KINDS = 12  # of so many machines, one has a backlog, five are crowded
_BACKLOG = 6
STATE = Path("state")  # in the simulated file system


class Options(Struct, frozen=True, kw_only=True):
    """With the seed, all that a run depends on."""

    steps: int
    faults: tuple[str, ...] = ()
    fail_call: int | None = None  # the n-th call that can fail does, once


class Plan(Struct, frozen=True, kw_only=True):
    """The machine of one run, and how busy it is."""

    config: Config
    models: tuple[str, ...]
    tenants: tuple[str, ...]
    prefixes: tuple[str, ...]  # what prompts begin with
    rest: int  # one turn in so many brings something new
    burst: int  # requests at once, at most
    swap_units: int  # that a swap takes at most
    token_units: int  # that a batch takes for each of its tokens, at least
    crowded: bool = False  # memory is short of KV, computing is slow, and swap is large and quick
    backlog: int = 0  # if not 0, all want one model, and each tenant has so many requests more waiting than can run


def draw(chooser: Chooser) -> Plan:
    below, pick = chooser.below, chooser.pick
    frames = 20 + below(21)
    models = tuple(_model(chooser, name, frames // 2) for name in "abcd"[: 1 + below(4)])
    tenants = ("", "alice", "bob")[: 1 + below(3)]
    plan = Plan(
        config=Config(
            driver="sim",
            memory=frames * FRAME,
            frame_size=FRAME,
            page_tokens=pick((None, 1, 2, 3, 4, 8)),
            batch_tokens=4 + below(37),
            batch_size=1 + below(6),
            queue_limit=6 + below(18),
            prefix_cache=below(4) < 3,
            slice_s=pick((10, 50, 200)) * UNIT,
            aging_s=pick((10, 50, 500)) * UNIT,
            queue_s=pick((None, None, None, 500 * UNIT)),
            swap_host=pick((0, 2, 8, 16, 1)) * FRAME,
            swap_disk=pick((0, 4, 16)) * FRAME,
            state=pick((None, STATE, STATE)),
            tenants={name: _tenant(chooser) for name in tenants if below(2)},
        ),
        models=models,
        tenants=tenants,
        prefixes=tuple(letter * (1 + below(20)) for letter in "xyz"),
        rest=2 + below(30),
        burst=1 + below(8),
        swap_units=pick((0, 0, 3, 40)),
        token_units=pick((0, 1, 4)),
    )
    kind = below(_KINDS)
    if kind == _KINDS - 1:
        plan = _backlogged(plan, chooser)
    elif kind >= _KINDS - 6:
        plan = _crowded(plan, chooser)
    speculation: Literal["auto", "always", "off"] = pick(("off", "auto", "always", "always"))
    return structs.replace(
        plan, config=structs.replace(plan.config, speculation=speculation, draft_tokens=1 + below(6))
    )


def _crowded(plan: Plan, chooser: Chooser) -> Plan:
    """The same machine, with less room beside the weights than its processes need, so that pages are swapped."""
    frames = 14 + chooser.below(8)
    config = structs.replace(
        plan.config,
        memory=frames * FRAME,
        batch_size=3 + chooser.below(4),
        batch_tokens=max(16, plan.config.batch_tokens),
        prefix_cache=chooser.below(8) < 7,
        swap_host=chooser.pick((16, 32, 4)) * FRAME,
        swap_disk=chooser.pick((16, 32, 0)) * FRAME,
    )
    models = tuple(_model(chooser, name, frames // 3, (400, 500)) for name in "ab"[: 1 + chooser.below(2)])
    return structs.replace(
        plan,
        config=config,
        models=models,
        rest=2 + chooser.below(6),
        swap_units=0,
        token_units=24,
        crowded=True,
    )


def _backlogged(plan: Plan, chooser: Chooser) -> Plan:
    """The same machine, with a backlog of each of several tenants whose weights differ: shares show there only."""
    tenants = ("", "alice", "bob")[: 2 + chooser.below(2)]
    first, slots = chooser.below(2), 1 + chooser.below(3)
    config = structs.replace(
        plan.config,
        batch_size=slots,
        queue_limit=2 * len(tenants) * (slots + _BACKLOG + 1),
        prefix_cache=False,
        queue_s=None,
        tenants={name: Tenant(weight=(1.0, 3.0)[(at + first) % 2]) for at, name in enumerate(tenants)},
    )
    return structs.replace(plan, config=config, models=plan.models[:1], tenants=tenants, backlog=_BACKLOG)


def _tenant(chooser: Chooser) -> Tenant:
    below, pick = chooser.below, chooser.pick
    weight = pick((1.0, 3.0, 0.5))
    max_processes = pick((None, None, 1 + below(6)))
    tokens = below(2000)
    return Tenant(
        weight=weight,
        max_processes=max_processes,
        max_tokens=pick((None, None, None, 200 + tokens, 60 + tokens // 8)),
        max_pages=pick((None, None, 8 + below(60))),
    )


def _model(chooser: Chooser, name: str, frames: int, kv: Sequence[int] = (64, 128, 200, 256, 500)) -> str:
    """A name that says what the model costs: at most `frames` frames of weights."""
    layers = 1 + chooser.below(3)
    size = FRAME * (1 + chooser.below(max(1, frames // layers)))
    weights = f"layers={layers}&layer_bytes={size}&kv_bytes_per_token={chooser.pick(kv)}"
    text = f"end_after={chooser.pick((0, 12, 30))}&context_length={chooser.pick((40, 64, 100))}"
    return f"sim:{name}?{weights}&{text}"
