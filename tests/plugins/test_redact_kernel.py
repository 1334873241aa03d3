"""The plugin `redact` in a kernel: what reaches the model, what reaches the reader, and what becomes of a filter that
fails."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import llm_os
from llm_os.drivers.formats.image import ModelImage
from llm_os.plugins.redact.filter import Redaction
from llm_os.plugins.redact.finder import Finder
from llm_os.plugins.redact.options import Options
from llm_os.testing import FilterConformance

MODEL = """
import llm_os
from llm_os.testing.scripted import Scripted, ScriptedImage

seen = []
answer = "Hello <NAME_1>, I wrote to <EMAIL_1>."

def script(conversation):
    seen.append(conversation)
    return answer

@llm_os.hookimpl
def register_drivers(register):
    register("scripted", lambda config: Scripted(script), lambda: Scripted(script).info())

@llm_os.hookimpl
def open_image(model, config):
    return ScriptedImage(name=model) if model.startswith("scripted:") else None
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A plugin with a model that says `answer`, and keeps what it was asked in `seen`."""
    name = f"scripted_{abs(hash(request.node.name))}"
    package, info = tmp_path / name, tmp_path / f"{name}-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    hooks = ["register_drivers", "open_image"]
    (package / "__init__.py").write_text(MODEL)
    (package / "llm_os.toml").write_text(f'[{name}]\nsummary = "a test"\ncontract = 1\nhooks = {json.dumps(hooks)}\n')
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[llm_os]\n{name} = {name}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return importlib.import_module(name)


@pytest.fixture
def boot(llm_os_kernel: Callable[..., llm_os.Kernel], model: Any) -> Callable[..., llm_os.Kernel]:
    """A kernel with that model, and the plugin unless it is told otherwise."""

    def boot(*plugins: str, **options: Any) -> llm_os.Kernel:
        names = (model.__name__, *(plugins or ("redact",)))
        return llm_os_kernel(driver="scripted", plugins=names, options={"redact": options} if options else {})

    return boot


def ask(content: Any, **fields: Any) -> llm_os.Request:
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return llm_os.Request(model="scripted:a", messages=messages, **fields)


def test_the_model_sees_placeholders_and_the_reader_the_values(boot: Callable[..., llm_os.Kernel], model: Any) -> None:
    stream = boot().stream(ask("My name is Alice Smith, alice@example.com, card 4111 1111 1111 1111."))
    chunks = [chunk.text for chunk in stream]
    assert "".join(chunks) == stream.result().text == "Hello Alice Smith, I wrote to alice@example.com."
    assert [text.split("user\n")[1].split("<|")[0] for text in model.seen] == [
        "My name is <NAME_1>, <EMAIL_1>, card <CARD_1>."
    ]


def test_requests_at_the_same_time_get_each_its_own(boot: Callable[..., llm_os.Kernel], model: Any) -> None:
    kernel = boot()
    streams = {
        n: kernel.stream(ask(f"My name is Bob B{'b' * n}, b{n}@example.com", tenant=f"t{n % 3}")) for n in range(1, 33)
    }
    for n, stream in streams.items():
        assert stream.result().text == f"Hello Bob B{'b' * n}, I wrote to b{n}@example.com."
    assert len({text for text in model.seen}) == 1  # to the model they are all alike


def test_samples_and_forks_of_a_prompt_are_restored(boot: Callable[..., llm_os.Kernel], model: Any) -> None:
    streams = boot().samples(ask("My name is Alice Smith, alice@example.com"), 4)
    assert {stream.result().text for stream in streams} == {"Hello Alice Smith, I wrote to alice@example.com."}
    assert all("alice" not in text.lower() for text in model.seen)


def test_a_fork_in_mid_answer_is_restored_from_the_beginning(boot: Callable[..., llm_os.Kernel], model: Any) -> None:
    model.answer = "Hello <NAME_1>, I wrote to <EMAIL_1>. " * 100
    kernel = boot()
    parent = kernel.stream(ask("My name is Alice Smith, alice@example.com"))
    next(iter(parent))
    child = kernel.fork(parent.pid)
    told = "".join(chunk.text for chunk in child)
    whole = "Hello Alice Smith, I wrote to alice@example.com. " * 100
    assert child.result().text == parent.result().text == whole
    assert told and whole.endswith(told)


def test_the_next_turn_finds_the_last_one_in_the_prefix_cache(boot: Callable[..., llm_os.Kernel], model: Any) -> None:
    kernel = boot()
    messages = [{"role": "user", "content": f"My name is Alice Smith, alice@example.com. {'Well. ' * 50}"}]
    first = kernel.stream(ask(messages)).result()
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And bob@example.com?"}]
    model.answer = "<EMAIL_2> too."
    second = kernel.stream(ask(messages)).result()
    assert second.text == "bob@example.com too."
    assert model.seen[1].startswith(model.seen[0]) and "<NAME_1>, I wrote to <EMAIL_1>." in model.seen[1]
    assert second.usage.cached_tokens > 0.9 * first.usage.prompt_tokens


def test_without_the_plugin_or_without_personal_data_nothing_changes(
    boot: Callable[..., llm_os.Kernel], model: Any
) -> None:
    texts = ("My name is Alice Smith", "What is the capital of France?")
    plain, redacting = boot("policies"), boot()
    assert [plain.stream(ask(text)).result().text for text in texts] == [model.answer] * 2
    assert "Alice Smith" in model.seen[0]
    assert redacting.stream(ask(texts[1])).result().text == model.answer
    assert model.seen[2] == model.seen[1]


def test_what_the_model_makes_up_is_redacted_where_the_operator_wants_it(
    boot: Callable[..., llm_os.Kernel], model: Any
) -> None:
    model.answer = "<EMAIL_1> or carol@example.net, <EMAIL_7>"
    request = ask("I am alice@example.com")
    assert boot().stream(request).result().text == "alice@example.com or carol@example.net, <EMAIL_7>"
    assert boot(answers=True).stream(request).result().text == "alice@example.com or <EMAIL>, <EMAIL_7>"


def test_tools_are_redacted_as_messages_are(boot: Callable[..., llm_os.Kernel], model: Any) -> None:
    tool = {"type": "function", "function": {"name": "mail", "description": "Mails alice@example.com."}}
    boot().stream(ask("Who is alice@example.com?", tools=(tool,))).result()
    assert "Mails <EMAIL_1>." in model.seen[0] and "Who is <EMAIL_1>?" in model.seen[0]


def test_a_filter_that_fails_lets_nothing_pass(
    boot: Callable[..., llm_os.Kernel], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = boot()

    def fail(self: Finder, text: str) -> list[Any]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Finder, "find", fail)
    for _ in range(4):  # the last one finds the plugin switched off
        with pytest.raises(llm_os.PluginError, match="'redact'"):
            kernel.stream(ask("My name is Alice Smith")).result()
    assert model.seen == []


def test_token_ids_are_refused(boot: Callable[..., llm_os.Kernel], model: Any) -> None:
    with pytest.raises(llm_os.RequestError, match="token ids, which the plugin 'redact' cannot read"):
        boot().stream(llm_os.Request(model="scripted:a", prompt=list(b"alice@example.com"))).result()
    assert model.seen == []


def test_a_real_model_never_sees_the_address_that_it_repeats(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = ModelImage.encode

    def spy(self: ModelImage, text: str, *, raw: bool) -> list[int]:
        encoded.append(text)
        return encode(self, text, raw=raw)

    monkeypatch.setattr(ModelImage, "encode", spy)
    prompt = "Write to alice@example.com, please. Yes, to alice@example.com. Once more: to"
    request = llm_os.Request(
        model=str(smollm2), prompt=prompt, sampling=llm_os.Sampling(max_tokens=24, temperature=0, stop=("\n",))
    )
    config = llm_os.Config(driver="cpu", memory="1GiB", precision="exact", threads=1, plugins=("redact",))
    with llm_os.Kernel(config) as kernel:
        completion = kernel.stream(request).result()
    with closing(llm_os.open_image(str(smollm2))) as image:
        decoder = image.decoder()
        wrote = "".join(map(decoder.push, completion.token_ids)) + decoder.flush()
    assert encoded == [prompt.replace("alice@example.com", "<EMAIL_1>")]
    assert wrote.strip() == "<EMAIL_1>" and completion.text == " alice@example.com"


class TestTheContract(FilterConformance):
    cases = (
        *FilterConformance.cases,
        (
            ask("My name is Alice Smith, a@b.org, <EMAIL_1>"),
            "Hello <NAME_1>, is it <EMAIL_1>, <TEXT_1> or carol@example.net? Call +49 170 1234567. <EMAIL_9>",
        ),
    )

    @pytest.fixture(autouse=True, params=[False, True], ids=["restores", "screens"])
    def answers(self, request: pytest.FixtureRequest) -> None:
        self.made = Redaction(Options(answers=request.param))

    def make(self) -> Redaction:
        return Redaction(self.made._chosen)
