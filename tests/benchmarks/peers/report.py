"""What was found, as tables for people, JSON for programs, and a plot; and whether the aims are met.

A ratio is the median of the rounds' ratios: the engines of a round ran within seconds of each other, so that a machine
that is slower for a while slows all of them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import environments
import fidelity
from bench import Plan, Results
from environments import OURS, SPECULATING
from measures import REPEATED, decode_of, prefill_of
from mixed import MEASURE as MIXED
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_LOWER_IS_BETTER = ("s", "ms", "MB", "nats", "%")
_BEST = "best peer"


@dataclass(frozen=True)
class Aim:
    """`engine`'s figure for `measure`, as a ratio to another's, or as it is where `against` is empty."""

    measure: str
    limit: float
    against: str = "llama.cpp"
    at_least: bool = True
    engine: str = OURS.name


AIMS = (
    Aim(decode_of(1, 128), 1.2),
    Aim(decode_of(8, 128), 2.5),
    Aim(decode_of(16, 128), 3, _BEST),
    Aim(decode_of(32, 128), 3, _BEST),
    Aim(decode_of(8, 1024), 3),
    Aim(prefill_of(512), 5),
    Aim(prefill_of(512), 1.5, _BEST),
    Aim(MIXED, 2.5, _BEST),
    Aim(REPEATED["code"], 2, OURS.name, engine=SPECULATING.name),
    Aim(REPEATED["prose"], 2, OURS.name, engine=SPECULATING.name),
    Aim("load to first token, warm", 1, at_least=False),
    Aim("peak memory", 1.5, at_least=False),
    Aim("import llm_os", 0.15, "", at_least=False),
    Aim("llm-os --help", 0.3, "", at_least=False),
    Aim(fidelity.DIVERGENCE, 1, at_least=False),
    Aim(fidelity.DISAGREEMENT, 1, at_least=False),
    Aim(fidelity.PERPLEXITY, 1, at_least=False),
)


def median(results: Results, measure: str, engine: str) -> float | None:
    values = results.samples.get(measure, {}).get(engine)
    return statistics.median(values) if values else None


def best_peer(results: Results, measure: str) -> str | None:
    """The peer with the best median; None where no peer was measured."""
    own = (OURS.name, SPECULATING.name)
    found = {name: median(results, measure, name) for name in results.samples.get(measure, {}) if name not in own}
    medians = {name: value for name, value in found.items() if value is not None}
    best = min if results.units.get(measure) in _LOWER_IS_BETTER else max
    return best(medians, key=lambda name: medians[name]) if medians else None


def ratio(results: Results, measure: str, engine: str, other: str) -> float | None:
    """None where either was not measured."""
    mine, theirs = (results.samples.get(measure, {}).get(name, []) for name in (engine, other))
    if not mine or not theirs:
        return None
    if len(mine) == len(theirs):
        return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    return statistics.median(mine) / statistics.median(theirs)


def judge(results: Results) -> list[dict[str, Any]]:
    """Each aim with what was found; `met` is None where it could not be measured."""
    judged = []
    for aim in AIMS:
        other = best_peer(results, aim.measure) if aim.against == _BEST else aim.against
        if other == "":
            found = median(results, aim.measure, aim.engine)
        else:
            found = None if other is None else ratio(results, aim.measure, aim.engine, other)
        met = None if found is None else found >= aim.limit if aim.at_least else found <= aim.limit
        judged.append(asdict(aim) | {"other": other, "found": found, "met": met})
    return judged


def show(results: Results, console: Console) -> None:
    engines = list(dict.fromkeys(name for each in results.samples.values() for name in each))
    table = Table(title="medians, and this project's ratio to others", title_justify="left")
    table.add_column("measure")
    for name in ("unit", *engines, "to llama.cpp", "to best peer"):
        table.add_column(name, justify="right")
    for measure, unit in results.units.items():
        values = [median(results, measure, name) for name in engines]
        best = best_peer(results, measure)
        ratios = [ratio(results, measure, OURS.name, other) if other else None for other in ("llama.cpp", best)]
        table.add_row(measure, unit, *map(_number, values), *map(_number, ratios))
    console.print(table)
    _show_aims(results, console)
    for measure, engine, why in results.unmeasured:
        console.print(f"[yellow]not measured[/]: {escape(f'{measure}, {engine}: {why}')}", highlight=False)


def _show_aims(results: Results, console: Console) -> None:
    table = Table(title="aims", title_justify="left")
    for name in ("measure", "aim", "found", ""):
        table.add_column(name)
    words = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]not measured[/]"}
    for aim in judge(results):
        sign = ">=" if aim["at_least"] else "<="
        against = f" x {aim['against']}" if aim["against"] else f" {results.units.get(aim['measure'], '')}"
        other = f" ({aim['other']})" if aim["against"] == _BEST and aim["other"] else ""
        wanted = f"{sign} {aim['limit']:g}{against}{other}"
        table.add_row(aim["measure"], wanted, _number(aim["found"]), words[aim["met"]])
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write(results: Results, plan: Plan, out: Path, began: float, busy: float) -> Path:
    """The JSON file."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = {
        "processor": cpus[0].split(":", 1)[1].strip() if cpus else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "busy_before": round(busy, 3),
    }
    text = {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(began)),
        "seconds": round(time.time() - began),
        "machine": machine,
        "plan": asdict(plan),
        "versions": results.versions,
        "measures": {measure: _figures(results, measure) for measure in results.samples},
        "aims": judge(results),
        "details": results.details,
        "unmeasured": [dict(zip(("measure", "engine", "why"), each, strict=True)) for each in results.unmeasured],
    }
    file = out / "peers.json"
    file.write_text(json.dumps(text, indent=1) + "\n")
    return file


def _figures(results: Results, measure: str) -> dict[str, Any]:
    engines = {
        name: {
            "median": statistics.median(samples),
            "samples": samples,
            "of llm-os": ratio(results, measure, OURS.name, name),  # its figure as a multiple of this one
        }
        for name, samples in results.samples[measure].items()
    }
    return {"unit": results.units[measure], "engines": engines}


def plot(found: Path, results: Results) -> Path | None:
    """Drawn in an environment that has matplotlib; None, and noted, where that cannot be."""
    picture = found.with_suffix(".png")
    try:
        python = environments.python_of(environments.PLOT)
        command = [str(python), str(environments.HERE / "plot.py"), str(found), str(picture)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    except (environments.Unavailable, OSError, subprocess.SubprocessError) as error:
        results.miss("plot", "matplotlib", str(error))
        return None
    if done.returncode:
        results.miss("plot", "matplotlib", done.stderr.strip().rpartition("\n")[2])
        return None
    return picture
