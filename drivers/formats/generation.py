"""What a model's authors recommend for sampling: `generation_config.json`, or `general.sampling.*` in a GGUF file."""

from __future__ import annotations

from llm_os.drivers.formats.fields import Fields
from llm_os.kernel.request import SamplingDefaults

_GGUF_NAMES = {"temperature": "temp", "repetition_penalty": "penalty_repeat"}


def sampling_from_directory(fields: Fields) -> SamplingDefaults:
    """Of `generation_config.json`. An explicit `do_sample: false` recommends greedy, and what stands beside it is void;
    a file without `do_sample` recommends the values that it has.
    """
    if not fields.flag("do_sample", True):
        return SamplingDefaults(temperature=0.0)
    return _sampling(fields, {})


def sampling_from_gguf(fields: Fields) -> SamplingDefaults:
    """Of metadata whose prefix is `general.sampling.`."""
    return _sampling(fields, _GGUF_NAMES)


def _sampling(fields: Fields, names: dict[str, str]) -> SamplingDefaults:
    def number(field: str, low: float, high: float) -> float | None:
        key = names.get(field, field)
        return None if fields.get(key) is None else fields.number(key, low, high)

    top_k = None if fields.get("top_k") is None else max(0, fields.integer("top_k", -1, 2**31 - 1))
    return SamplingDefaults(
        temperature=number("temperature", 0, 100),
        top_k=top_k,
        top_p=number("top_p", 0, 1),
        min_p=number("min_p", 0, 1),
        repetition_penalty=number("repetition_penalty", 0.01, 100),
    )
