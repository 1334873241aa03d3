"""`llm-os redact`: what it prints, and what it says of files that it cannot take."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

import llm_os
from llm_os.plugins.redact.command import redact

TEXT = "Mail alice@example.com or bob@example.org,\nnot alice@example.com.\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "letter.txt"
    path.write_text(TEXT, "utf-8")
    return path


def test_it_prints_the_text_without_the_data(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert redact(file) == 0
    assert capsys.readouterr().out == "Mail <EMAIL_1> or <EMAIL_2>,\nnot <EMAIL_1>.\n"


def test_it_reads_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Ruf +49 170 1234567, Jürgen".encode())))
    assert redact() == 0
    assert capsys.readouterr().out == "Ruf <PHONE_1>, Jürgen"


def test_json_says_where_each_value_is_and_what_stands_for_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert redact(file, json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["text"] == "Mail <EMAIL_1> or <EMAIL_2>,\nnot <EMAIL_1>.\n"
    assert [TEXT[span["start"] : span["end"]] for span in printed["spans"]] == [
        span["value"] for span in printed["spans"]
    ]
    assert [(span["kind"], span["placeholder"]) for span in printed["spans"]] == [
        ("EMAIL", "<EMAIL_1>"),
        ("EMAIL", "<EMAIL_2>"),
        ("EMAIL", "<EMAIL_1>"),
    ]


def test_figures_measure_a_labelled_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = tmp_path / "sample.jsonl"
    sample.write_text(
        '{"text": "to a@b.org", "spans": [[3, 10, "EMAIL"]]}\n{"text": "Bob", "spans": [[0, 3, "NAME"]]}\n'
    )
    assert redact(sample, figures=True) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["kind", "labelled", "precision", "recall", "F1", "covered"]
    assert rows[1] == ["EMAIL", "1", "1.000", "1.000", "1.000", "1.000"]
    assert rows[2] == ["NAME", "1", "1.000", "0.000", "0.000", "0.000"]
    assert rows[3] == ["all", "2", "1.000", "0.500", "0.667", "0.700"]


@pytest.mark.parametrize(
    ("content", "figures", "message"),
    [
        (None, False, "No such file"),
        (b"caf\xe9", False, "not UTF-8 at byte 3"),
        (b'{"text": 1}\n', True, "line 1: Expected `str`"),
        (b'{"text": "a"}\nnonsense\n', True, "line 2"),
    ],
)
def test_a_file_that_cannot_be_taken_is_named(
    tmp_path: Path, content: bytes | None, figures: bool, message: str
) -> None:
    path = tmp_path / "input"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(llm_os.RequestError, match=message) as caught:
        redact(path, figures=figures)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_figures_need_a_file() -> None:
    with pytest.raises(llm_os.RequestError, match="--figures needs the file"):
        redact(figures=True)


def test_the_command_is_registered_where_the_plugin_is_on() -> None:
    commands = llm_os.commands(llm_os.Config(plugins=("redact",)))
    assert commands["redact"][0] is redact
    assert "redact" not in llm_os.commands()
