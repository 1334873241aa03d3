"""Prompt lookup: what followed the last tokens before is guessed, and long texts cost no more than short ones."""

from __future__ import annotations

import random

import pytest

import llm_os
from llm_os.plugins import prompt_lookup
from llm_os.plugins.prompt_lookup import Lookup


def lookup(text: bytes, limit: int = 99) -> bytes:
    return bytes(Lookup().guess(list(text), limit))


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    assert lookup(b"the quick brown fox; the quick b", 5) == b"rown "


def test_a_text_without_repetition_gives_no_guess() -> None:
    assert lookup(b"") == lookup(b"a") == lookup(b"aa") == lookup(b"abcdefghijkl") == b""


def test_the_place_with_most_in_common_wins_over_the_latest() -> None:
    assert lookup(b"one two three, six two four, one two ", 4) == b"thre"
    assert lookup(b"x y1 x y2 x y", 1) == b"2", "of equals the latest"


def test_a_long_match_gives_more_guesses_than_a_short_one() -> None:
    text = b"abcdefghijklmnopqrstuvwxyz"
    assert [len(lookup(text + text[:matched])) for matched in (1, 2, 3, 6)] == [0, 4, 6, 12]
    assert len(lookup(text + text[:6], 7)) == 7


def test_a_repetition_runs_on() -> None:
    assert lookup(b"abcabcabcab", 9) == b"cabcabcab"
    assert lookup(b"zzz", 3) == b"zzz"


def test_it_makes_no_difference_in_which_pieces_a_text_comes() -> None:
    random.seed(7)
    text = [random.randrange(3) for _ in range(400)]
    whole = Lookup()
    whole.guess(text[:-1], 9)
    piecewise = Lookup()
    for token in text[:-1]:
        piecewise.guess([token], 9)
    assert whole.guess(text[-1:], 9) == piecewise.guess(text[-1:], 9) != []


def test_a_long_prompt_is_read_over_some_steps() -> None:
    draft, prompt = Lookup(), list(range(3 * prompt_lookup._STEP))
    end = prompt[-2:]
    assert draft.guess([*prompt, *prompt[10:12]], 3) == [12, 13, 14], "its beginning is known at once"
    assert draft.guess([*end, 1], 3) == []
    for _ in range(3):
        draft.guess([], 3)
    assert draft.guess(prompt[-9:-5], 3) == prompt[-5:-2]


def test_what_it_remembers_has_an_end() -> None:
    draft = Lookup()
    for start in range(0, 5 * prompt_lookup._WINDOW, 1000):
        draft.guess(list(range(start, start + 1000)), 5)
        assert len(draft._tokens) <= prompt_lookup._WINDOW + 1000 >= len(draft._latest)
    for _ in range(prompt_lookup._WINDOW // prompt_lookup._STEP):
        draft.guess([], 5)
    last = start + 1000
    assert draft.guess([last - 50, last - 49], 3) == [last - 48, last - 47, last - 46], "the latest is remembered"
    assert draft.guess([0, 1], 3) == [], "the oldest is not"


@pytest.mark.parametrize("plugins", [(), ("-prompt_lookup",)])
def test_it_is_on_by_default_and_never_changes_an_answer(plugins: tuple[str, ...]) -> None:
    sampling = llm_os.Sampling(max_tokens=60, temperature=0)
    prompts = ["abab" * 5, "".join(map(chr, range(40, 90)))]
    said = []
    for speculation in ("always", "off"):
        config = llm_os.Config(driver="sim", memory="64MiB", plugins=plugins, speculation=speculation)  # type: ignore[arg-type]
        with llm_os.Kernel(config) as kernel:
            streams = [kernel.stream(llm_os.Request(model="sim:a", prompt=p, sampling=sampling)) for p in prompts]
            said.append([stream.result() for stream in streams])
    with_guesses, without = said
    assert [each.token_ids for each in with_guesses] == [each.token_ids for each in without]
    assert any(each.usage.drafted_tokens for each in with_guesses) == (not plugins)
    assert not any(each.usage.drafted_tokens for each in without)
