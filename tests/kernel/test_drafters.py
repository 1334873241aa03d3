"""Drafters of plugins that raise, hang, dawdle or answer nonsense: they are asked no more, and no answer changes."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import anyio
import pytest

import llm_os
from llm_os.kernel.guarded import GuardedDrafter
from llm_os.kernel.isolation import Guard, Health

PLUGIN = """
import llm_os

@llm_os.hookimpl
def register_drafters(register):
    register("guessing", test)

test = None
"""


class Fixed:
    """A drafter whose guesses come from a function of its own."""

    def __init__(self, guess: Callable[[Sequence[int], int], Any]) -> None:
        self._guess = guess
        self.calls = 0
        self.contexts: list[llm_os.DraftContext] = []

    def open(self, context: llm_os.DraftContext) -> Fixed:
        self.contexts.append(context)
        return self

    def guess(self, new: Sequence[int], limit: int) -> Any:
        self.calls += 1
        return self._guess(new, limit)


@pytest.fixture
def boot(install: Callable[..., None]) -> Iterator[Callable[..., llm_os.Kernel]]:
    kernels: list[llm_os.Kernel] = []

    def boot(drafter: object, **config: Any) -> llm_os.Kernel:
        install("guessing", PLUGIN, "register_drafters")
        importlib.import_module("guessing").test = drafter  # type: ignore[attr-defined]
        fields: dict[str, Any] = {
            "plugins": ("guessing", "-prompt_lookup"),
            "hook_limit_s": 0.1,
            "speculation": "always",
        }
        kernels.append(llm_os.Kernel(llm_os.Config(driver="sim", memory="64MiB", **{**fields, **config})))
        return kernels[-1]

    yield boot
    for kernel in kernels:
        kernel.close()


def ask(kernel: llm_os.Kernel, prompt: str = "hello", count: int = 20, **fields: Any) -> llm_os.Completion:
    sampling = llm_os.Sampling(**{"max_tokens": count, "temperature": 1.0, "seed": 5, **fields})
    return anyio.run(kernel.generate, llm_os.Request(model="sim:a", prompt=prompt, tenant="t", sampling=sampling))


@pytest.fixture(scope="module")
def expected() -> tuple[int, ...]:
    with llm_os.Kernel(llm_os.Config(driver="sim", memory="64MiB", speculation="off")) as kernel:
        return ask(kernel).token_ids


def hang(new: object, limit: int) -> Any:
    while True:
        len([0] * 10)


@pytest.mark.parametrize(
    ("guess", "told"),
    [
        (lambda new, limit: 1 / 0, "Draft.guess raised ZeroDivisionError"),
        (lambda new, limit: "abc", "it gave no list or tuple of token ids"),
        (lambda new, limit: [1.5], "it gave no list or tuple of token ids"),
        (lambda new, limit: None, "it gave no list or tuple of token ids"),
        (lambda new, limit: iter([97]), "it gave no list or tuple of token ids"),
        (hang, "Draft.guess took longer than 0.1 s"),
    ],
)
def test_a_drafter_that_fails_is_off_after_three_processes_and_changes_no_answer(
    boot: Any, expected: tuple[int, ...], guess: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = Fixed(guess)
    kernel = boot(drafter)
    for _ in range(5):
        assert ask(kernel).token_ids == expected
    assert drafter.calls == 3, "once for each process, and no more after three failures"
    assert told in caplog.text and "plugin 'guessing' is off" in caplog.text


@pytest.mark.parametrize("given", [7, "draft", object()])
def test_what_is_no_draft_is_a_failure_and_none_is_not(boot: Any, expected: tuple[int, ...], given: Any) -> None:
    class Odd:
        opened: Any = None

        def open(self, context: object) -> Any:
            return self.opened

    odd = Odd()
    kernel = boot(odd)
    for _ in range(4):
        assert ask(kernel).token_ids == expected
    health = kernel._loop.plugins.drafters[0]._health
    assert health.off is None
    odd.opened = given
    for _ in range(4):
        assert ask(kernel).token_ids == expected
    assert health.off is not None


@pytest.mark.parametrize(
    "guess",
    [
        lambda new, limit: [97] * 10_000,
        lambda new, limit: [10**30, -1],
        lambda new, limit: [97, 5000, 97],
        lambda new, limit: [256, 97],
        lambda new, limit: (),
    ],
)
def test_guesses_that_cannot_be_are_cut(boot: Any, expected: tuple[int, ...], guess: Any) -> None:
    kernel = boot(Fixed(guess))
    completion = ask(kernel)
    assert completion.token_ids == expected
    assert completion.usage.drafted_tokens <= 15 * 20


def test_a_drafter_sees_each_token_once_and_whose_it_is(boot: Any) -> None:
    seen: list[int] = []
    drafter = Fixed(lambda new, limit: seen.extend(new) or ())
    completion = ask(boot(drafter), "hello")
    assert seen == [*b"hello", *completion.token_ids][:-2], "the last token but one has nothing to guess after it"
    (context,) = drafter.contexts
    assert (context.tenant, context.model, context.image.vocab_size) == ("t", "sim:a", 257)


def test_the_drafter_of_a_stranger_is_asked_before_ours(boot: Any) -> None:
    first = Fixed(lambda new, limit: [97])
    kernel = boot(first, plugins=("guessing",))
    assert [type(each._drafter).__name__ for each in kernel._loop.plugins.drafters] == ["Fixed", "PromptLookup"]
    assert ask(kernel, "ababab").usage.drafted_tokens == 18, "one for each step but the last, and none from ours"


def test_something_else_than_a_drafter_stops_the_boot_with_the_plugins_name(boot: Any) -> None:
    with pytest.raises(
        llm_os.ConfigError, match=r"plugin 'guessing': register_drafters raised TypeError: .*has no open"
    ):
        boot(object())


def test_a_drafter_that_is_slow_on_the_average_is_asked_no_more(caplog: pytest.LogCaptureFixture) -> None:
    def slow(new: object, limit: int) -> list[int]:
        until = time.perf_counter() + 0.021
        while time.perf_counter() < until:
            pass
        return []

    guard, health = Guard(60.0), Health("guessing")
    drafter = Fixed(slow)
    guarded = GuardedDrafter(drafter, health, guard)
    context = llm_os.DraftContext(pid=1, tenant="", model="m", image=llm_os.open_image("sim:a"))
    with caplog.at_level(logging.ERROR):
        for _ in range(40):
            draft = guarded.open(context)
            if draft is not None:
                draft.guess([], 5)
    guard.close()
    assert 3 <= drafter.calls <= 20 and "asked no more" in caplog.text
    assert health.off is None, "what else the plugin does goes on"


def test_plugins_are_told_how_many_guesses_a_batch_had(install: Callable[..., None]) -> None:
    install(
        "guess_ears",
        "import llm_os\nsteps = []\n@llm_os.hookimpl\ndef step_finished(step): steps.append(step)\n",
        "step_finished",
    )
    steps = importlib.import_module("guess_ears").steps
    config = llm_os.Config(driver="sim", memory="64MiB", plugins=("guess_ears",), speculation="always")
    with llm_os.Kernel(config) as kernel:
        usage = ask(kernel, "abcabcabc").usage
    assert sum(step.drafted for step in steps) == usage.drafted_tokens > 0
    assert sum(step.accepted for step in steps) == usage.accepted_tokens
    assert sum(step.tokens for step in steps) == 9 + 19 - usage.accepted_tokens + usage.drafted_tokens


# -- with a grammar --------------------------------------------------------------------------------------------------

WORD = b"never say never again"
SPELL = """
import llm_os

@llm_os.hookimpl
def compile_grammar(grammar, image):
    return test

test = None
"""


class Spell:
    """A language of two words, that begin alike; it notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def matcher(self) -> Spell:
        return self

    def allowed(self, answer: Sequence[int]) -> bytes:
        said = bytes(answer)
        self.asked.append(said)
        words = [word for word in (WORD, b"never mind") if word.startswith(said)]
        assert words, "asked about what the grammar does not allow"
        bits = bytearray(33)
        for word in words:
            token = word[len(said)] if len(said) < len(word) else 256
            bits[token >> 3] |= 1 << (token & 7)
        return bytes(bits)


@pytest.mark.parametrize("right", [True, False])
def test_a_guess_that_a_grammar_forbids_is_never_followed(boot: Any, install: Any, right: bool) -> None:
    said: list[int] = []

    def guess(new: Sequence[int], limit: int) -> list[int]:
        said.extend(new)
        answer = bytes(said[5:])
        word = next((word for word in (WORD, b"never mind") if word.startswith(answer)), b"")
        rest = list(word[len(answer) :][:6])
        return rest if right else [*rest[:2], 122, *rest[3:]]

    install("guessed_spell", SPELL, "compile_grammar")
    spell = importlib.import_module("guessed_spell").test = Spell()  # type: ignore[attr-defined]
    kernel = boot(Fixed(guess), plugins=("guessing", "guessed_spell", "-prompt_lookup"))
    completion = ask(kernel, grammar=llm_os.Grammar(kind="lark", source="any"), count=60)
    assert completion.text in (WORD.decode(), "never mind") and completion.finish_reason == "stop"
    assert all(any(word.startswith(asked) for word in (WORD, b"never mind")) for asked in spell.asked)
    assert completion.usage.accepted_tokens > (10 if right else 3)
