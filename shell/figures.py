"""What `llm-os bench` found, as a table and as one object for JSON. Knows no kernel and no clock."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import llm_os
from llm_os.shell.measure import Figure, Load
from llm_os.shell.progress import megabytes


@dataclass
class Found:
    """What was measured. Figures of prompts by length, of answers by (batch, context)."""

    tokens: int  # of each answer
    rounds: int
    loads: list[Load] = field(default_factory=list)
    prompts: dict[int, Figure] = field(default_factory=dict)  # seconds to the first token
    answers: dict[tuple[int, int], Figure] = field(default_factory=dict)  # tokens a second of all together
    peak_bytes: int = 0
    weights: int = 0
    kv_bytes_per_token: int = 0
    left_out: list[str] = field(default_factory=list)


def report(model: str, config: llm_os.Config, found: Found, device: llm_os.DeviceInfo | None) -> dict[str, Any]:
    return {
        "model": model,
        "llm_os": llm_os.__version__,
        "precision": config.precision,
        "speculation": config.speculation,
        "threads": config.threads,
        "device": {name: getattr(device, name) for name in device.__struct_fields__} if device else None,
        "tokens": found.tokens,
        "loads": [asdict(load) for load in found.loads],
        "prompts": [
            {
                "tokens": length,
                "tok_s": length / figure.median,
                "first_token_s": figure.median,
                "spread": figure.spread,
                "rounds_s": figure.rounds,
            }
            for length, figure in found.prompts.items()
        ],
        "answers": [
            {
                "batch": batch,
                "context": context,
                "tok_s": figure.median,
                "spread": figure.spread,
                "rounds_tok_s": figure.rounds,
            }
            for (batch, context), figure in found.answers.items()
        ],
        "memory": {
            "peak_bytes": found.peak_bytes,
            "peak_bytes_one_answer": found.loads[0].peak_bytes,
            "weights_bytes": found.weights,
            "kv_bytes_per_token": found.kv_bytes_per_token,
        },
        "left_out": found.left_out,
    }


def text(model: str, config: llm_os.Config, found: Found, device: llm_os.DeviceInfo | None) -> list[str]:
    lines = [f"{model}, {config.precision}, speculation {config.speculation}", *_machine(config, device), ""]
    lines.append(f"{'LOAD':<8}{'START':>12}{'LOAD':>12}{'FIRST TOKEN':>14}")
    for name, load in zip(("first", "second"), found.loads, strict=True):
        lines.append(f"{name:<8}{_s(load.start_s):>12}{_s(load.load_s):>12}{_s(load.first_token_s):>14}")
    if found.prompts:
        lines += ["", f"{'PROMPT':<8}{'TOKENS/S':>12}{'SPREAD':>12}{'FIRST TOKEN':>14}"]
    for length, figure in found.prompts.items():
        speed = f"{length / figure.median:,.1f}"
        lines.append(f"{length:<8,}{speed:>12}{figure.spread:>12.1%}{_s(figure.median):>14}")
    lines += _answers(found)
    peak, first = megabytes(found.peak_bytes), megabytes(found.loads[0].peak_bytes)
    return [
        *lines,
        "",
        f"Tokens a second of all answers together; medians of {found.rounds}, spread is half the range.",
        f"Memory of the process at most: {peak}, with one answer {first};",
        f"weights {megabytes(found.weights)}, KV {found.kv_bytes_per_token:,} bytes a token.",
    ]


def _machine(config: llm_os.Config, device: llm_os.DeviceInfo | None) -> list[str]:
    if device is None:
        return [f"driver {config.driver}"]
    threads = f", --threads {config.threads}" if config.threads else ""
    known = [" ".join(device.features), ", ".join(f"{name} {value}" for name, value in device.details.items())]
    return [f"{device.driver}: {device.device}{threads}", *filter(None, known)]


def _answers(found: Found) -> list[str]:
    """A row for each batch, two columns for each context."""
    contexts = sorted({context for _, context in found.answers})
    if not contexts:
        return []
    lines = ["", f"{'BATCH':<8}" + "".join(f"{f'AFTER {context:,}':>14}{'SPREAD':>12}" for context in contexts)]
    for batch in sorted({batch for batch, _ in found.answers}):
        cells = [found.answers.get((batch, context)) for context in contexts]
        row = [f"{cell.median:>14,.1f}{cell.spread:>12.1%}" if cell else f"{'-':>14}{'-':>12}" for cell in cells]
        lines.append(f"{batch:<8}{''.join(row)}")
    return lines


def _s(seconds: float) -> str:
    return f"{seconds:,.3f} s"
