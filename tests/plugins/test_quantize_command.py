"""`llm-os quantize`: what is printed, what is kept, and what is asked of who wants more."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

import llm_os
from llm_os import TokenLogprob
from llm_os.plugins.quantize import command
from llm_os.plugins.quantize.command import missing, quantize
from llm_os.plugins.quantize.records import Records
from llm_os.plugins.quantize.report import Figures, Report, divergence, windows


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_OS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def figures(after: float = 20.2, agreement: float = 0.95) -> Figures:
    return Figures(positions=10, perplexity_before=20.0, perplexity_after=after, agreement=agreement, kl=0.01)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Comparing gives what is put at the front; what it was asked comes behind."""
    found: list[Any] = [figures()]

    def compare(model: str, compression: str, texts: dict[str, str], positions: int, config: llm_os.Config) -> Report:
        found.append((model, compression, list(texts), positions, config.precision))
        return Report(
            model=model,
            compression=compression,
            precision=config.precision,
            device="a test",
            total=found[0],
            texts={"prose": found[0]},
            bytes_before=1000,
            bytes_after=290,
        )

    monkeypatch.setattr(command, "compare", compare)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"any")
    return path


class Known:
    name = "model"

    def __init__(self, path: Path) -> None:
        self.path = path


def kept(model: Path, name: str = "int8") -> Report | None:
    return Records.of(llm_os.Config()).kept(Known(model), name)  # type: ignore[arg-type]


def test_what_is_good_enough_is_kept(compared: list[Any], model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(str(model), compression="int4", precision="exact") == 0
    assert compared[1] == (str(model), "int4", ["prose", "code", "languages"], 2560, "exact")
    printed = capsys.readouterr().out
    assert "20.000" in printed and "+1.00%" in printed and "95.0%" in printed
    assert "1,000 bytes before, 290 after (29%)" in printed
    assert f"kept: {model}+int4" in printed
    report = kept(model, "int4")
    assert report is not None and report.total == figures()
    assert kept(model, "int8") is None


def test_what_is_not_good_enough_is_not_kept_any_more(
    compared: list[Any], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(str(model)) == 0
    compared[0] = figures(after=21.5, agreement=0.8)
    assert quantize(str(model)) == 1
    assert kept(model) is None
    printed = capsys.readouterr().out
    assert "not kept: perplexity rises by 7.5%, the limit is 5%; use more bits, or --perplexity 8" in printed
    assert "the same next token in 80.0%, the limit is 85%; use more bits, or --agreement 80" in printed
    assert quantize(str(model), perplexity=8, agreement=80) == 0
    assert kept(model) is not None


def test_who_would_save_nothing_is_told_so(
    compared: list[Any], model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(str(model))
    assert "takes no more as it is" not in capsys.readouterr().out
    compare = command.compare
    monkeypatch.setattr(command, "compare", lambda *each: structs.replace(compare(*each), bytes_after=1500))
    quantize(str(model))
    assert f"1,500 after (150%); at this precision {model} takes no more as it is" in capsys.readouterr().out


def test_json_is_one_object(compared: list[Any], model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(str(model), json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] is True and found["missing"] == []
    assert found["total"]["agreement"] == 0.95
    record = json.loads(Path(found["record"]).read_text())
    assert len(record["sha256"]) == 64 and record["report"]["bytes_after"] == 290


def test_a_text_of_ones_own(compared: list[Any], model: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("naïve")
    quantize(str(model), text=text)
    assert compared[1][2] == ["mine.txt"]
    text.write_bytes(b"\xff")
    with pytest.raises(llm_os.RequestError, match=r"mine\.txt is not UTF-8 at byte 0"):
        quantize(str(model), text=text)
    with pytest.raises(llm_os.RequestError, match="No such file"):
        quantize(str(model), text=tmp_path / "absent")


def test_limits_out_of_range_and_unknown_models_are_refused(model: Path) -> None:
    for wrong in ({"perplexity": -1.0}, {"agreement": 101.0}, {"positions": 0}, {"perplexity": math.nan}):
        with pytest.raises(llm_os.RequestError, match="--positions 1 to 1000000"):
            quantize(str(model), **wrong)
    with pytest.raises(llm_os.ModelNotFound):
        quantize(str(model) + ".absent")


def test_a_model_of_nan_is_never_kept() -> None:
    assert len(missing(figures(after=math.nan, agreement=math.nan), 1e6, 0)) == 2


def test_windows_take_turns_and_predict_as_many_tokens_as_asked() -> None:
    texts = {"a": list(range(1000)), "b": list(range(40)), "c": [1]}
    chosen = windows(texts, 300)
    assert sum(len(piece) - 1 for _, piece in chosen) == 300
    assert [name for name, _ in chosen[:3]] == ["a", "b", "a"]
    assert max(len(piece) for _, piece in chosen) == 38
    assert windows({"a": [1], "b": []}, 10) == []
    assert sum(len(piece) - 1 for _, piece in windows(texts, 10**6)) == 1000 - 8 + 39


def line(*chances: float) -> TokenLogprob:
    return TokenLogprob(0, 0.0, tuple((token, math.log(chance)) for token, chance in enumerate(chances)))


def test_divergence_is_kullbacks_with_the_rest_as_one_token() -> None:
    assert divergence(line(0.5, 0.3), line(0.5, 0.3)) == 0
    expected = 0.5 * math.log(0.5 / 0.25) + 0.3 * math.log(0.3 / 0.5) + 0.2 * math.log(0.2 / 0.25)
    assert divergence(line(0.5, 0.3), line(0.25, 0.5)) == pytest.approx(expected)
    assert divergence(line(1.0), line(0.5, 0.5)) == pytest.approx(math.log(2))
