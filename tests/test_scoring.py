"""`llm_os.score`: what a model thinks of given tokens is what it thought when it chose them."""

from __future__ import annotations

from pathlib import Path

import pytest

import llm_os


def config(memory: str = "2GiB") -> llm_os.Config:
    return llm_os.Config(driver="cpu", precision="exact", memory=memory)


def test_scores_are_the_log_probabilities_of_an_answer(smollm2: Path) -> None:
    prompt = [504, 3575, 282, 4649, 314]
    sampling = llm_os.Sampling(max_tokens=6, temperature=1, seed=3, logprobs=4)
    with llm_os.Kernel(config()) as kernel:
        answer = kernel.stream(llm_os.Request(model=str(smollm2), prompt=prompt, sampling=sampling)).result()
    whole = [*prompt, *answer.token_ids]
    scores = llm_os.score(str(smollm2), [whole, prompt[:2], whole[:7]], top=4, config=config())
    assert [len(line) for line in scores.texts] == [len(whole) - 1, 1, 6]
    assert [each.token_id for each in scores.texts[0]] == whole[1:]
    assert scores.texts[0][len(prompt) - 1 :] == list(answer.logprobs)
    assert scores.texts[2] == scores.texts[0][:6]
    assert scores.weights > 500_000_000 and scores.seconds > 0


def test_what_cannot_be_scored_is_refused(smollm2: Path) -> None:
    for text in ([], [5], [1, 49152], [1, -1], [0] * 8193):
        with pytest.raises(llm_os.RequestError, match="it must have 2 to 8192 of"):
            llm_os.score(str(smollm2), [[1, 2], text], config=config())
    with pytest.raises(llm_os.Refused, match=r"needs .* to score texts, of 300 MiB; raise memory"):
        llm_os.score(str(smollm2), [[1, 2]], config=config("300MiB"))
    assert llm_os.score(str(smollm2), [], config=config()).texts == []
    with pytest.raises(llm_os.DriverError, match="no log-probability for a token"):  # it draws tokens from a hash
        llm_os.score("sim:a", [[1, 2]], config=llm_os.Config(driver="sim"))
