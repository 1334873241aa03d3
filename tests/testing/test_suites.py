"""The suites that plugin authors get: ours pass them, and each fault that they are there for is found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_os
from llm_os.drivers.sim import SimImage
from llm_os.kernel.kernel import Kernel
from llm_os.kernel.plugins import Plugins
from llm_os.testing import (
    DrafterConformance,
    FilterConformance,
    FormatConformance,
    Machine,
    PassConformance,
    PolicyConformance,
    ToolConformance,
)

# -- ours --------------------------------------------------------------------------------------------------------------


class TestFair(PolicyConformance):
    def make(self) -> llm_os.Policy:
        return llm_os.Fair()


class TestFifo(PolicyConformance):
    def make(self) -> llm_os.Policy:
        from llm_os.plugins.policies import Fifo

        return Fifo()


class TestPromptLookup(DrafterConformance):
    def make(self) -> llm_os.Drafter:
        from llm_os.plugins.prompt_lookup import PromptLookup

        return PromptLookup()


class TestSimImage(FormatConformance):
    def open(self) -> llm_os.Image:
        return SimImage.parse("sim:a")


class TestModelFile(FormatConformance):
    path: Path

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def file(cls, smollm2: Path) -> None:
        cls.path = smollm2

    def open(self) -> llm_os.Image:
        return llm_os.open_image(str(self.path))


class Masked:
    """Digits become #, but "x" holds back what the next piece could make "xx", which goes."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        text = "".join("#" if each.isdigit() else each for each in self._held + text)
        text = text.replace("xx", "")
        self._held = "x" if text.endswith("x") else ""
        return text.removesuffix("x") if self._held else text

    def flush(self) -> str:
        return self._held


class Mask:
    def open(self, request: llm_os.Request) -> tuple[llm_os.Request, llm_os.TextFilter | None] | None:
        return request, Masked()


class TestFilter(FilterConformance):
    def make(self) -> llm_os.Filter:
        return Mask()


class Nothing:
    def apply(self, image: llm_os.Image) -> llm_os.Image:
        return image


class TestPass(PassConformance):
    model = "sim:a"

    def make(self) -> llm_os.Pass:
        return Nothing()


def _tool(**changed: Any) -> llm_os.Tool:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    fields = {"name": "double", "description": "Twice a.", "parameters": schema, "call": lambda given: given["a"] * 2}
    return llm_os.Tool(**{**fields, **changed})


class TestTool(ToolConformance):
    arguments = ({"a": 1}, {"a": -7})

    def make(self) -> llm_os.Tool:
        return _tool(argument_class=lambda arguments: f"double:{arguments['a']}")


# -- what they find ----------------------------------------------------------------------------------------------------


class Filter:
    """A filter made of two functions."""

    def __init__(self, push: Callable[..., Any], open: Callable[..., Any] | None = None) -> None:
        self._push, self._open = push, open

    def open(self, request: llm_os.Request) -> Any:
        return self._open(request) if self._open else (request, self)

    def push(self, text: str) -> Any:
        return self._push(text)

    def flush(self) -> str:
        return ""


seen: list[str] = []
FILTERS = {
    "cuts": (lambda: Filter(lambda text: text.replace("ca", "CA")), "test_an_answer_is_the_same_whatever_its_cuts"),
    "ends of pieces": (lambda: Filter(str.strip), "test_an_answer_is_the_same_whatever_its_cuts"),
    "no text": (lambda: Filter(len), "test_an_answer_is_the_same_whatever_its_cuts"),
    "a shared state": (
        lambda: Filter(lambda text: seen.append(text) or f"{text}{len(seen)}"),
        "test_answers_at_the_same_time_do_not_see_each_other",
    ),
    "chance": (
        lambda: Filter(str, lambda r: (llm_os.Request(model=r.model, prompt=str(random.random())), None)),
        "test_the_same_request_opens_the_same_again",
    ),
    "another tenant": (
        lambda: Filter(str, lambda r: (llm_os.Request(model=r.model, prompt="x", tenant="root"), None)),
        "test_a_request_is_taken_refused_or_let_be",
    ),
    "no pair": (lambda: Filter(str, lambda r: r), "test_a_request_is_taken_refused_or_let_be"),
    "in place": (
        lambda: Filter(str, lambda r: r.messages and r.messages.clear()),
        "test_a_request_is_not_changed_in_place",
    ),
}


@pytest.mark.parametrize("fault", FILTERS)
def test_a_filter_with_a_fault_is_found(fault: str) -> None:
    make, name = FILTERS[fault]

    class Suite(FilterConformance):
        cases = tuple(
            (llm_os.Request(model=r.model, prompt=r.prompt, messages=[dict(m) for m in r.messages or ()] or None), a)
            for r, a in FilterConformance.cases
        )

        def make(self) -> Any:
            return make()

    with pytest.raises(AssertionError):
        getattr(Suite(), name)()


class Numbers:
    def __init__(self, share: Callable[[Any], Any], rank: Callable[[Any], Any] = lambda _: 0) -> None:
        self.share, self.rank = share, rank


def _counter() -> Callable[[Any], int]:
    numbers: Iterator[int] = iter(range(10**9))
    return lambda _: next(numbers)


POLICIES = {
    "no number": (lambda: Numbers(lambda share: share.tenant), "test_a_share_is_a_finite_number_and_the_same_again"),
    "NaN": (lambda: Numbers(lambda s: float("nan")), "test_a_share_is_a_finite_number_and_the_same_again"),
    "a memory": (lambda: Numbers(_counter()), "test_a_share_is_a_finite_number_and_the_same_again"),
    "a rank that is infinite": (
        lambda: Numbers(lambda s: 0, lambda c: float("inf") if c.deadline is None else c.deadline),
        "test_a_rank_is_a_finite_number_and_the_same_again",
    ),
}


@pytest.mark.parametrize("fault", POLICIES)
def test_a_policy_with_a_fault_is_found(fault: str) -> None:
    make, name = POLICIES[fault]

    class Suite(PolicyConformance):
        def make(self) -> Any:
            return make()

    with pytest.raises(AssertionError):
        getattr(Suite(), name)()


class Gossip:
    """Guesses with what `guess` makes of the new tokens, the limit and all that it has ever heard."""

    def __init__(self, guess: Callable[[Any, int, list[int]], Any]) -> None:
        self._guess, self._heard = guess, list[int]()

    def open(self, context: Any) -> Any:
        return self

    def guess(self, new: Any, limit: int) -> Any:
        self._heard.extend(new)
        return self._guess(new, limit, self._heard)


DRAFTERS = {
    "too many": (lambda new, limit, heard: [7] * (limit + 1), "test_it_guesses_token_ids_and_no_more_than_the_limit"),
    "no ids": (lambda new, limit, heard: ["7"], "test_it_guesses_token_ids_and_no_more_than_the_limit"),
    "of others": (lambda new, limit, heard: heard[:limit], "test_one_process_is_not_told_what_another_has_said"),
}


@pytest.mark.parametrize("fault", DRAFTERS)
def test_a_drafter_with_a_fault_is_found(fault: str) -> None:
    guess, name = DRAFTERS[fault]

    class Suite(DrafterConformance):
        def make(self) -> Any:
            return Gossip(guess)

    with pytest.raises(AssertionError):
        getattr(Suite(), name)()


TOOLS = {
    "a name with spaces": ({"name": "my tool"}, "test_its_name_is_one_that_models_can_say"),
    "a schema of a list": ({"parameters": {"type": "array"}}, "test_its_parameters_are_a_json_schema_of_an_object"),
    "a schema that is no JSON": ({"parameters": {"type": "object", "x": (1,)}}, "test_its_parameters_are_a_json_"),
    "an example that does not fit": ({"parameters": {"type": "object", "required": ["b"]}}, "test_the_examples_fit_"),
    "no time": ({"timeout_s": 0.0}, "test_its_limits_are_limits"),
    "a long answer": ({"call": lambda _: "x" * 70_000}, "test_calls_give_text_or_json_in_their_time"),
    "too slow": ({"call": lambda _: seen_forever(), "timeout_s": 0.05}, "test_calls_give_text_or_json_in_their_time"),
    "arguments that change": ({"call": lambda given: given.clear()}, "test_a_call_does_not_change_its_arguments"),
    "a class of two lines": ({"argument_class": lambda _: "a\nb"}, "test_permissions_see_one_line_"),
}


def seen_forever() -> None:
    import threading

    threading.Event().wait(60)


@pytest.mark.parametrize("fault", TOOLS)
def test_a_tool_with_a_fault_is_found(fault: str) -> None:
    changed, name = TOOLS[fault]

    class Suite(ToolConformance):
        arguments = ({"a": 1},)

        def make(self) -> llm_os.Tool:
            return _tool(**changed)

    (test,) = [each for each in dir(Suite) if each.startswith(name)]
    with pytest.raises(AssertionError):
        getattr(Suite(), test)()


class Changed:
    """An image with one thing changed."""

    def __init__(self, image: llm_os.Image, **changed: Any) -> None:
        self._image = image
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image, name)


PASSES: dict[str, tuple[dict[str, Any], str]] = {
    "another context": ({"context_length": 7}, "test_what_is_said_stays_as_it_is"),
    "other tokens": ({"encode": lambda text, raw: [1]}, "test_what_is_said_stays_as_it_is"),
    "a file left open": ({"close": lambda: None}, "test_the_changed_model_closes_the_one_that_it_took_over"),
}


@pytest.mark.parametrize("fault", PASSES)
def test_a_pass_with_a_fault_is_found(fault: str) -> None:
    changed, name = PASSES[fault]

    class Compression:
        def apply(self, image: llm_os.Image) -> Any:
            return Changed(image, **changed)

    class Suite(PassConformance):
        model = "sim:a"

        def make(self) -> Any:
            return Compression()

    with pytest.raises(AssertionError):
        getattr(Suite(), name)()


class HalfCharacters:
    def push(self, token: int) -> str:
        return bytes([token % 256]).decode("utf-8", "surrogateescape")

    def flush(self) -> str:
        return ""


FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "half characters": ({"decoder": HalfCharacters}, "test_any_tokens_become_text_without_half_characters"),
    "an end beyond the vocabulary": (
        {"turn_end_tokens": frozenset({999})},
        "test_the_tokens_that_end_an_answer_are_of_the_vocabulary",
    ),
    "text that is lost": ({"encode": lambda text, raw: [1, 2]}, "test_text_comes_back_from_its_tokens"),
}


@pytest.mark.parametrize("fault", FORMATS)
def test_an_image_with_a_fault_is_found(fault: str) -> None:
    changed, name = FORMATS[fault]
    image = Changed(SimImage.parse("sim:a"), **changed)
    with pytest.raises((AssertionError, UnicodeEncodeError)):
        getattr(FormatConformance(), name)(image)


# -- fixtures ----------------------------------------------------------------------------------------------------------


def test_kernels_of_the_fixture_are_closed_at_the_end() -> None:
    from llm_os.testing import plugin

    fixture = plugin.llm_os_kernel.__wrapped__()  # as pytest runs it
    boot = next(fixture)
    first, second = boot(), boot(memory="32MiB", plugins=())
    assert isinstance(first, Kernel) and second.memory().total == 32 << 20
    assert next(fixture, None) is None
    for kernel in (first, second):
        with pytest.raises(llm_os.Closed):
            kernel.stream(llm_os.Request(model="sim:a", prompt="x")).result()


def test_a_kernel_and_the_core_in_virtual_time_answer_alike(
    llm_os_kernel: Callable[..., llm_os.Kernel], llm_os_machine: type[Machine]
) -> None:
    machine = llm_os_machine(policy="fifo")
    machine.submit(1, "in virtual time")
    machine.settle()
    request, _ = machine.requests[1]
    sampling = llm_os.Sampling(max_tokens=8, temperature=0)
    answer = llm_os_kernel().stream(llm_os.Request(model="sim:a", prompt="in virtual time", sampling=sampling)).result()
    assert list(answer.token_ids) == machine.tokens(1) == machine.expected(1)
    assert request.prompt == "in virtual time"


def test_a_policy_that_no_plugin_has_registered_decides_in_virtual_time(llm_os_machine: type[Machine]) -> None:
    class Shortest:
        def share(self, share: llm_os.Share) -> float:
            return 0.0

        def rank(self, candidate: llm_os.Candidate) -> float:
            return float(candidate.max_tokens)

    def ends(policy: Any) -> list[int]:
        machine = llm_os_machine(policy=policy, batch_size=1)
        for pid, length in ((1, 30), (2, 20), (3, 5)):
            machine.submit(pid, "x", sampling={"max_tokens": length})
        machine.settle()
        fed = [sequence.pid for run in machine.runs for sequence in run.batch.sequences]
        return sorted((1, 2, 3), key=lambda pid: len(fed) - fed[::-1].index(pid))

    assert ends(Shortest()) == [3, 2, 1]
    assert ends("fair") == [1, 2, 3]


def test_built_in_policies_are_those_that_are_tested_here() -> None:
    plugins = Plugins(llm_os.Config())
    plugins.close()
    assert set(plugins._policies) == {"fair", "fifo"}
