"""Grammars of plugins that raise, hang or answer nonsense end the request that has one, and nobody else's."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence

import anyio
import pytest

import llm_os

PLUGIN = """
import llm_os

@llm_os.hookimpl
def compile_grammar(grammar, image):
    return test.compile(grammar.source)

test = None
"""
WORD = b"never say never again"
END = 256


def bits_of(*tokens: int) -> bytes:
    bits = bytearray(33)
    for token in tokens:
        bits[token >> 3] |= 1 << (token & 7)
    return bytes(bits)


class Spell:
    """A language of one word, and what happens at one of its letters."""

    def __init__(self, trouble: Callable[[], object], letter: int = 10) -> None:
        self._trouble = trouble
        self._letter = letter

    def compile(self, source: str) -> Spell:
        if source == "late":
            self._trouble()
        return self

    def matcher(self) -> Spell:
        return self

    def allowed(self, answer: Sequence[int]) -> object:
        if len(answer) == self._letter:
            return self._trouble()
        return bits_of(WORD[len(answer)]) if len(answer) < len(WORD) else bits_of(END)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set at the end of the test, so that calls which hang until then end with it."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def kernel(install: Callable[..., None]) -> Iterator[Callable[[object], llm_os.Kernel]]:
    kernels: list[llm_os.Kernel] = []

    def boot(language: object) -> llm_os.Kernel:
        install("spell", PLUGIN, "compile_grammar")
        importlib.import_module("spell").test = language  # type: ignore[attr-defined]
        config = llm_os.Config(driver="sim", memory="64MiB", plugins=("spell",), hook_limit_s=0.2)
        kernels.append(llm_os.Kernel(config))
        return kernels[-1]

    yield boot
    for each in kernels:
        each.close()


def request(source: str | None = "soon", seed: int = 1) -> llm_os.Request:
    grammar = None if source is None else llm_os.Grammar(kind="lark", source=source)
    sampling = llm_os.Sampling(max_tokens=60, temperature=1.0, seed=seed, grammar=grammar)
    return llm_os.Request(model="sim:a", prompt="hello", sampling=sampling)


def test_a_plugin_of_strangers_is_asked_before_ours(kernel: Callable[[object], llm_os.Kernel]) -> None:
    spell = Spell(lambda: bits_of(WORD[10]))
    assert anyio.run(kernel(spell).generate, request()).text == WORD.decode()


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (lambda: 1 / 0, "plugin 'spell': Matcher.allowed raised ZeroDivisionError"),
        (lambda: "abc", "plugin 'spell': Matcher.allowed raised TypeError"),
        (lambda: bytes(32), "plugin 'spell': Matcher.allowed raised ValueError: it gave bits for 256 tokens of 257"),
        (lambda: bytes(33), "the grammar allows no token and no end after 10 tokens of the answer"),
    ],
)
def test_a_mask_that_fails_ends_its_process_and_no_neighbour(
    kernel: Callable[[object], llm_os.Kernel], trouble: Callable[[], object], message: str
) -> None:
    booted = kernel(Spell(trouble))
    alone = anyio.run(booted.generate, request(None))
    neighbour = booted.stream(request(None))
    with pytest.raises(llm_os.Error, match=message):
        anyio.run(booted.generate, request())
    assert anyio.run(neighbour.collect).token_ids == alone.token_ids
    assert not booted.ps()


def test_a_mask_that_hangs_ends_its_process_with_the_plugins_name(
    kernel: Callable[[object], llm_os.Kernel], released: threading.Event
) -> None:
    booted = kernel(Spell(released.wait))
    alone = anyio.run(booted.generate, request(None))
    neighbour = booted.stream(request(None))
    with pytest.raises(llm_os.PluginError, match=r"plugin 'spell': Matcher.allowed took longer than 0\.2 s"):
        anyio.run(booted.generate, request())
    assert anyio.run(neighbour.collect).token_ids == alone.token_ids


def test_masks_that_hang_turn_their_plugin_off(
    kernel: Callable[[object], llm_os.Kernel], released: threading.Event
) -> None:
    booted = kernel(Spell(released.wait, letter=0))

    async def all_at_once() -> list[str]:
        errors = []
        for stream in booted.samples(request(), 8):
            with pytest.raises(llm_os.PluginError) as error:
                await stream.collect()
            errors.append(str(error.value))
        return errors

    errors = anyio.run(all_at_once)
    off = [error for error in errors if "plugin 'spell' is off" in error]
    assert len(off) >= 4, "each of eight was waited for"
    with pytest.raises(llm_os.PluginError, match="plugin 'spell' is off"):
        anyio.run(booted.generate, request())
    assert anyio.run(booted.generate, request(None)).finish_reason == "length"


def test_a_grammar_that_takes_for_ever_to_compile_ends_its_request(
    kernel: Callable[[object], llm_os.Kernel], released: threading.Event
) -> None:
    booted = kernel(Spell(released.wait))
    with pytest.raises(llm_os.PluginError, match=r"compile_grammar took longer than 0\.2 s"):
        anyio.run(booted.generate, request("late"))
    assert not booted.ps()


def test_a_process_that_is_killed_while_its_grammar_is_compiled_ends(
    kernel: Callable[[object], llm_os.Kernel], released: threading.Event
) -> None:
    begun = threading.Event()
    booted = kernel(Spell(lambda: (begun.set(), released.wait(5))))
    stream = booted.stream(request("late"))
    assert begun.wait(10)
    anyio.run(booted.kill, stream.pid)
    assert anyio.run(stream.collect).finish_reason == "cancelled"


def test_a_grammar_that_is_empty_or_too_long_or_of_no_kind_is_refused_at_the_door() -> None:
    for fields in ({"source": ""}, {"source": "x" * (2**20 + 1)}, {"source": "x", "kind": "yaml"}):
        with pytest.raises(llm_os.RequestError):
            llm_os.Grammar(**{"kind": "regex", **fields})
    with pytest.raises(llm_os.RequestError):
        llm_os.Sampling(grammar="a+")
