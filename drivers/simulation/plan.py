"""What is simulated: the options of a run, and the machine that a seed draws: its memory, models, tenants.

Machines are small, so that everything is short of something: a few processes, a few dozen frames, texts of a few pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct

from llm_os.drivers.sim import SimImage
from llm_os.drivers.simulation.chooser import Chooser
from llm_os.kernel.config import Config

FRAME = 4096
STATE = Path("state")  # in the simulated file system


class Options(Struct, frozen=True, kw_only=True):
    """With the seed, all that a run depends on."""

    steps: int
    faults: tuple[str, ...] = ()
    fail_call: int | None = None  # the n-th call that can fail does, once


class Plan(Struct, frozen=True, kw_only=True):
    """The machine of one run."""

    config: Config
    models: tuple[str, ...]
    tenants: tuple[str, ...]
    prefixes: tuple[str, ...]  # what prompts begin with
    restful: int  # one step in so many brings something new
    burst: int  # of so many at most


def draw(chooser: Chooser) -> Plan:
    frames = 20 + chooser.below(21)
    batch_tokens = 4 + chooser.below(37)
    weights = frames // 2
    models = tuple(_model(chooser, name, weights) for name in "abcd"[: 1 + chooser.below(4)])
    tenants = ("", "alice", "bob")[: 1 + chooser.below(3)]
    prefixes = tuple(letter * (1 + chooser.below(20)) for letter in "xyz")
    options: dict[str, Any] = {}
    config = Config(
        driver="sim",
        memory=frames * FRAME,
        frame_size=FRAME,
        page_tokens=(None, 1, 2, 3, 4, 8)[chooser.below(6)],
        batch_tokens=batch_tokens,
        batch_size=1 + chooser.below(6),
        queue_limit=6 + chooser.below(18),
        **options,
    )
    return Plan(
        config=config,
        models=models,
        tenants=tenants,
        prefixes=prefixes,
        restful=2 + chooser.below(30),
        burst=1 + chooser.below(8),
    )


def _model(chooser: Chooser, name: str, frames: int) -> str:
    """A name that says what the model costs: at most `frames` frames of weights."""
    layers = 1 + chooser.below(3)
    size = FRAME * (1 + chooser.below(max(1, frames // layers)))
    kv = (64, 128, 200, 256, 500)[chooser.below(5)]
    ends = (0, 12, 30)[chooser.below(3)]
    context = (40, 64, 100)[chooser.below(3)]
    weights = f"layers={layers}&layer_bytes={size}"
    return f"sim:{name}?{weights}&kv_bytes_per_token={kv}&end_after={ends}&context_length={context}"


def frames_of(image: SimImage, config: Config) -> int:
    """That the weights and the workspace of a model take."""
    return image.layers * -(-image.layer_bytes // FRAME) + -(-config.batch_tokens * 64 // FRAME)
