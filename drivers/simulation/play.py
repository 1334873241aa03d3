"""One run from a seed or from a script, and the file that a run which failed leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from llm_os.drivers.simulation.chooser import Chooser, Script
from llm_os.drivers.simulation.faults import FAULTS
from llm_os.drivers.simulation.plan import Options
from llm_os.drivers.simulation.violation import Violation
from llm_os.drivers.simulation.world import World
from llm_os.kernel.errors import FormatError


class Failure(Struct, frozen=True, kw_only=True):
    """A broken promise, and how to see it again: as a regression file, with what happened before it in words."""

    seed: int
    options: Options
    kind: str
    message: str
    step: int
    script: Script
    story: list[str] = []


class Outcome(Struct, frozen=True, kw_only=True):
    """What came of one run."""

    seed: int
    steps: int
    trace: str  # hash of all that happened
    calls: int  # that could fail
    faults: dict[str, int]
    actions: dict[str, int]
    ends: dict[str, int]
    failure: Failure | None = None


def play(seed: int, options: Options, script: Script | None = None, *, tell: bool = False) -> Outcome:
    """Run once; never raises for what the kernel does. With `tell`, a failure has its story."""
    chooser = Chooser(seed, script)
    world = World(options, chooser, tell=tell)
    failure = None
    try:
        world.run()
    except Violation as violation:
        failure = Failure(
            seed=seed,
            options=options,
            kind=violation.kind,
            message=str(violation),
            step=world.steps,
            script=chooser.log,
            story=world.trace.story,
        )
    return Outcome(
        seed=seed,
        steps=world.steps,
        trace=world.trace.digest,
        calls=world.faults.calls,
        faults={kind: world.faults.hit[kind] for kind in options.faults},
        actions=dict(sorted(world.actions.items())),
        ends=dict(sorted(world.judge.ends.items())),
        failure=failure,
    )


def replay(file: Path) -> Outcome:
    """Play a regression file again. Raises FormatError for what is none, OSError."""
    try:
        failure = msgspec.json.decode(file.read_bytes(), type=Failure)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} is no regression file of the simulator: {error}") from None
    unknown = sorted({*failure.options.faults} - {*FAULTS})
    if unknown:
        raise FormatError(f"{file} has faults that this version does not know: {', '.join(unknown)}")
    return play(failure.seed, failure.options, failure.script, tell=True)


def save(failure: Failure, folder: Path) -> Path:
    """Write the regression file; its name says what was broken."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "".join(letter if letter.isalnum() else "-" for letter in failure.kind)
    file = folder / f"{kind}-{failure.seed}.json"
    plain: Any = msgspec.to_builtins(failure)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(plain), indent=0) + b"\n")
    return file
