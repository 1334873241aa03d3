"""The plugin `quantize` with a real model: what a pass costs in bytes and in quality, and who is told."""

from __future__ import annotations

import importlib
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llm_os
from llm_os.drivers.native.processor import can_compile
from llm_os.plugins.quantize import passes
from llm_os.plugins.quantize.passes import Quantize, remind, types
from llm_os.plugins.quantize.records import Records
from llm_os.plugins.quantize.report import Figures, Report, compare, shipped_texts
from llm_os.testing import PassConformance

native = pytest.mark.skipif(not can_compile(), reason="models run as native code on other processors")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records go to a place of the test's own, and nobody has been reminded."""
    remind.cache_clear()
    monkeypatch.setenv("LLM_OS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def config(**fields: Any) -> llm_os.Config:
    fields = {"driver": "cpu", "memory": "2GiB", "plugins": ("quantize",), **fields}
    return llm_os.Config(**fields)


def quiet(**fields: Any) -> llm_os.Config:
    return config(options={"quantize": {"remind": False}}, **fields)


def report_of(model: Path, compression: str = "int8") -> Report:
    figures = Figures(positions=10, perplexity_before=20.0, perplexity_after=20.2, agreement=0.95, kl=0.01)
    return Report(
        model=str(model),
        compression=compression,
        precision="fast",
        device="a test",
        total=figures,
        texts={"prose": figures},
        bytes_before=100,
        bytes_after=30,
    )


class _OfSmolLM2(PassConformance):
    @pytest.fixture(autouse=True)
    def _model(self, smollm2: Path) -> None:
        type(self).model = str(smollm2)


class TestInt8(_OfSmolLM2):
    def make(self) -> llm_os.Pass:
        return Quantize("int8", None)


class TestInt4(_OfSmolLM2):
    def make(self) -> llm_os.Pass:
        return Quantize("int4", None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8", {"a": "Q8_0", "b": "Q8_0", "output.weight": "Q8_0"}),
        ("int4", {"a": "Q4_1", "b": "Q4_1", "output.weight": "Q8_0"}),
    ],
)
def test_each_matrix_whose_rows_are_whole_groups_gets_a_type(name: str, expected: dict[str, str]) -> None:
    shapes = {"a": (10, 128), "b": (10, 96), "output.weight": (10, 64), "c": (10, 33)}
    assert types(shapes, name) == expected


def test_a_model_that_no_type_fits_is_refused_rather_than_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "weight_matrices", lambda image: {"a": (10, 33)})
    image: Any = SimpleNamespace(name="odd")
    with pytest.raises(llm_os.Unsupported, match=r"odd\+int4: no matrix has rows of a multiple of 32 values"):
        Quantize("int4", None).apply(image)


# Of the bytes in float32: a quarter, or an eighth, with scales, and the embedding as it was.
@pytest.mark.parametrize(("name", "share"), [("int8", 0.31), ("int4", 0.23)])
def test_a_model_in_fewer_bits_stays_near_itself(smollm2: Path, name: str, share: float) -> None:
    texts = {each: text[:40] for each, text in shipped_texts().items()}
    report = compare(str(smollm2), name, texts, 80, quiet(precision="exact"))
    assert report.total.positions == sum(each.positions for each in report.texts.values()) > 20
    assert report.bytes_after < share * report.bytes_before
    assert report.total.perplexity_before > 10  # a small model, and texts that it has not seen
    assert abs(report.total.increase) < 0.02
    assert report.total.agreement > 0.9
    assert report.total.kl < (0.005 if name == "int8" else 1e-6)  # its file is Q4_1, and int4 leaves that as it is


@native
def test_in_fast_mode_it_runs_in_the_same_native_code_as_the_model_itself(smollm2: Path) -> None:
    texts = [list(range(200, 232)), list(range(900, 932))]
    plain, eight, four = (llm_os.score(f"{smollm2}{bits}", texts, config=quiet()) for bits in ("", "+int8", "+int4"))
    assert four.texts == plain.texts
    pairs = zip(chain(*plain.texts), chain(*eight.texts), strict=True)
    differences = [abs(after.logprob - before.logprob) for before, after in pairs]
    assert 0 < sum(differences) / len(differences) < 0.2
    assert four.weights == plain.weights < eight.weights < 200_000_000  # with a head in float32 it would be more


def test_the_ledger_has_the_bytes_and_an_answer_does_not_depend_on_company(smollm2: Path) -> None:
    plain, small = str(smollm2), f"{smollm2}+int8"
    sampling = llm_os.Sampling(max_tokens=4, temperature=0)
    prompts = ["The capital of France is", "def fibonacci(n):", "Es war einmal"]

    def ask(kernel: llm_os.Kernel, model: str, prompt: str) -> llm_os.Stream:
        return kernel.stream(llm_os.Request(model=model, prompt=prompt, sampling=sampling))

    with llm_os.Kernel(quiet()) as kernel:
        alone = [ask(kernel, small, prompt).result().token_ids for prompt in prompts]
        few = kernel.memory()
        together = [ask(kernel, model, prompt) for prompt in prompts for model in (plain, small)]
        answers = [stream.result().token_ids for stream in together]
        both = kernel.memory()
    assert answers[1::2] == alone
    assert 130 << 20 < few.weights < 190 << 20  # frames are whole
    assert few.driver <= few.weights + few.kv + few.cached + few.slack
    assert both.weights - few.weights > 80 << 20


def test_who_uses_a_model_without_a_kept_report_is_told_once(
    smollm2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Path(shutil.copy(smollm2, tmp_path / "model.gguf"))
    records = Records.of(config())

    def open_twice(name: str) -> list[str]:
        caplog.clear()
        remind.cache_clear()
        for _ in range(2):  # as two kernels would
            Quantize(name, records).apply(llm_os.open_image(str(model))).close()
        return [record.getMessage() for record in caplog.records]

    with caplog.at_level(logging.WARNING, "llm_os.plugins.quantize"):
        (line,) = open_twice("int8")
        assert line.endswith(f"llm-os quantize {model} --with int8 makes one")
        records.keep(model, report_of(model))
        assert open_twice("int8") == []
        assert len(open_twice("int4")) == 1
        with model.open("ab") as file:  # another model now
            file.write(b"\0")
        assert len(open_twice("int8")) == 1
        records.keep(model, report_of(model))
        assert open_twice("int8") == []
        records.forget(model, "int8")
        assert len(open_twice("int8")) == 1
        place = records.keep(model, report_of(model))
        place.write_text(place.read_text().replace('"version": 2', '"version": 1'))  # of another int8
        assert len(open_twice("int8")) == 1
        place.write_text("{damaged")
        assert len(open_twice("int8")) == 1


def test_the_reminder_can_be_turned_off_and_other_options_are_refused(
    smollm2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "llm_os.plugins.quantize"):
        llm_os.open_image(f"{smollm2}+int8", quiet()).close()
        assert caplog.records == []
        llm_os.open_image(f"{smollm2}+int8", config()).close()
        assert len(caplog.records) == 1
    with pytest.raises(llm_os.ConfigError, match=r"no 'reminder'; there is remind"):
        llm_os.open_image("sim:a", config(options={"quantize": {"reminder": True}}))


def test_a_pass_needs_the_plugin_and_a_model_with_weights(smollm2: Path) -> None:
    with pytest.raises(llm_os.ModelNotFound):
        llm_os.open_image(f"{smollm2}+int8")
    with pytest.raises(llm_os.ModelNotFound):
        llm_os.open_image(f"{smollm2}+int8+int2", quiet())
    with pytest.raises(llm_os.Unsupported, match="sim:a has no weights"):
        llm_os.open_image("sim:a+int8", quiet())


PAGE = Path(__file__).parents[2] / "docs" / "plugins" / "quantize.md"


@pytest.fixture
def prune_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "prune_for_a_test"
    package, info = tmp_path / name, tmp_path / f"{name}-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (package / "__init__.py").write_text(example)
    (package / "llm_os.toml").write_text(
        f'[{name}]\nsummary = "for a test"\ncontract = {llm_os.CONTRACT}\nhooks = ["register_passes"]\n'
    )
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[llm_os]\n{name} = {name}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield name


def test_the_pass_in_the_docs_changes_weights_and_goes_before_ours(smollm2: Path, prune_plugin: str) -> None:
    both = quiet(plugins=("quantize", prune_plugin), precision="exact")
    name = "blk.0.ffn_down.weight"
    with closing(llm_os.open_image(f"{smollm2}+prune", both)) as image:
        weights: Any = image
        assert not (abs(values := weights.weights[name].float32()) < 1e-3)[values != 0].any()
        assert (values == 0).mean() > 0.001
        texts = [image.encode(text, raw=True)[:6] for text in shipped_texts().values()]
    plain, pruned, small = (
        llm_os.score(f"{smollm2}{passes}", texts, config=both) for passes in ("", "+prune", "+prune+int8")
    )
    assert pruned.weights == plain.weights
    assert small.weights < 0.31 * plain.weights
    sums = [sum(token.logprob for line in each.texts for token in line) for each in (plain, pruned, small)]
    assert sums[0] != sums[1]
    assert max(sums) - min(sums) < 0.05 * abs(sums[0])
