"""A mask leaves tokens to choose from; what is chosen among them is as if there were no others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import llm_os
from llm_os.drivers.torch import sampler
from llm_os.kernel.driver import RowError, Sample, Sampled


def sample(logits, wishes):
    return sampler.sample(sampler.scores_of(logits), wishes)


LOGITS = torch.tensor([[3.0, 5.0, 1.0, 4.0, 2.0, 5.0, 0.0, 4.5, -1.0, 2.5]])


class Only:
    """A mask of these tokens; `error` is raised instead."""

    def __init__(self, *tokens: int, error: Exception | None = None) -> None:
        self._bits = np.packbits(np.isin(np.arange(16), tokens), bitorder="little").tobytes()
        self._error = error

    def begin(self) -> None:
        return

    def bits(self) -> bytes:
        if self._error is not None:
            raise self._error
        return self._bits


def choose(mask: Only | None, logits: torch.Tensor = LOGITS, **fields: object) -> Sampled | RowError:
    (row,) = sample(logits, [Sample(**{"uniform": 0.5, "mask": mask, **fields})])
    return row


@pytest.mark.parametrize("fields", [{}, {"presence_penalty": 0.1, "output": (3,)}, {"logit_bias": ((2, 0.5),)}])
def test_greedy_takes_the_best_that_is_allowed(fields: dict[str, object]) -> None:
    assert choose(Only(0, 4, 2, 9), **fields) == Sampled(0)
    assert choose(Only(8), **fields) == Sampled(8)


@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.2}, {"logit_bias": ((1, 1000.0), (4, 1.5))}]
)
def test_a_draw_is_that_from_a_model_of_the_allowed_tokens(fields: dict[str, object]) -> None:
    allowed = [0, 3, 4, 7, 9]
    biases = {token: bias for token, bias in fields.get("logit_bias", ())}  # type: ignore[attr-defined]
    small = torch.tensor([[float(LOGITS[0, token]) + biases.get(token, 0.0) for token in allowed]])
    rest = {name: value for name, value in fields.items() if name != "logit_bias"}
    for uniform in np.linspace(0, 0.999999, 50):
        drawn = choose(Only(*allowed), temperature=1.0, **{**fields, "uniform": float(uniform)})
        alone = choose(None, small, temperature=1.0, **{**rest, "uniform": float(uniform)})
        assert isinstance(drawn, Sampled) and isinstance(alone, Sampled)
        assert drawn.token == allowed[alone.token]


@pytest.mark.parametrize("temperature", [1e-9, 0.3, 1.0, 100.0])
def test_no_bias_temperature_or_rounding_brings_a_masked_token_back(temperature: float) -> None:
    logits = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)) * 50
    for uniform in (0.0, 0.5, 1 - 2**-53):
        row = choose(Only(5, 11), logits, temperature=temperature, uniform=uniform, logit_bias=((3, 1000.0),))
        assert isinstance(row, Sampled) and row.token in (5, 11)


def test_log_probabilities_are_the_models_own() -> None:
    masked, free = choose(Only(2, 4), logprobs=3), choose(None, logprobs=3)
    assert isinstance(masked, Sampled) and isinstance(free, Sampled) and masked.logprob is not None
    assert masked.top == free.top
    expected = torch.log_softmax(LOGITS[0].double(), dim=0)[4]
    assert masked.token == 4 and masked.logprob == pytest.approx(float(expected))


def test_a_mask_that_fails_fails_its_row_only() -> None:
    error = llm_os.PluginError("plugin 'mine': no")
    logits = LOGITS.repeat(3, 1)
    rows = sample(
        logits, [Sample(uniform=0), Sample(uniform=0, mask=Only(error=error)), Sample(uniform=0, mask=Only(6))]
    )
    assert rows == [Sampled(1), RowError("plugin 'mine': no", error), Sampled(6)]


def test_a_mask_of_tokens_that_the_model_has_not_is_an_error() -> None:
    row = choose(Only(12))
    assert isinstance(row, RowError) and "no token" in row.message
