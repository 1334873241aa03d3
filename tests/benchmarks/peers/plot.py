"""Draws what a run found: `python plot.py FOUND.json PICTURE.png`, in an environment that has matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def draw(found: dict[str, Any], picture: Path) -> None:
    measures = found["measures"]
    panels: dict[str, dict[str, str]] = {}  # title -> label of a group of bars -> measure
    for name, each in measures.items():
        if each["unit"] == "tokens/s":
            kind, _, size = name.partition(" ")
            size, _, context = size.partition(" at ")
            title = f"{kind} at {context}" if context else kind
            panels.setdefault(title, {})[size] = name
    if not panels:
        raise SystemExit("nothing was measured that a plot could show")
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False)
    shown = [measures[name]["engines"] for names in panels.values() for name in names.values()]
    engines = list(dict.fromkeys(engine for each in shown for engine in each))
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        width = 0.8 / len(engines)
        for number, engine in enumerate(engines):
            values = [measures[name]["engines"].get(engine, {}).get("median", 0) for name in names.values()]
            places = [index + number * width for index in range(len(names))]
            axis.bar(places, values, width, label=engine)
        axis.set_xticks([index + 0.4 - width / 2 for index in range(len(names))], list(names))
        axis.set_title(title)
        axis.set_ylabel("tokens a second")
    axes[0][0].legend()
    machine = found["machine"]
    figure.suptitle(f"{machine['processor']}, {found['plan']['threads']} threads, {found['began']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
