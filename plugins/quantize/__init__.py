"""Models in fewer bytes, and a report on what that costs: the plugin `quantize`. See docs/plugins/quantize.md.

Request(model="MODEL+int8")  ->  passes.Quantize: which matrix in which type; the driver reads them so
llm-os quantize MODEL        ->  report.compare: both models on the same texts  ->  records.Records: what was kept
"""

from __future__ import annotations

from llm_os import Config, RegisterCommand, RegisterPass, hookimpl


@hookimpl
def register_passes(register: RegisterPass, config: Config) -> None:
    from llm_os.plugins.quantize.passes import PASSES, Quantize
    from llm_os.plugins.quantize.records import Records

    options = config.options.get("quantize", {})
    if unknown := sorted(set(options) - {"remind"}):
        raise ValueError(f"options of quantize: there is no {unknown[0]!r}; there is remind")
    records = Records.of(config) if options.get("remind", True) else None
    for name in PASSES:
        register(name, Quantize(name, records))


@hookimpl
def register_commands(register: RegisterCommand) -> None:
    from llm_os.plugins.quantize.command import quantize

    register("quantize", quantize, "Compare a model with itself in 8 or 4 bits, and keep what is good enough.")
