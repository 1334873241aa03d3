"""Alias files: ours vouches for what it names, a user's may add and override, a damaged one says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_os.drivers.store import Store, aliases, names
from llm_os.kernel.errors import ConfigError, ModelNotFound

GOOD = {"source": "file:/m.gguf", "sha256": "0" * 64}


def test_every_shipped_source_has_a_hash_and_a_length() -> None:
    shipped = aliases.load(None)
    assert "smollm2:135m" in shipped
    for alias in shipped.values():
        assert all(names.is_sha256(source.sha256) and source.bytes for source in alias.sources)


def test_a_users_alias_overrides_a_shipped_one(add_alias: Callable[..., None], home: Path) -> None:
    add_alias("smollm2:135m", GOOD)
    assert aliases.load(home / "aliases.json")["smollm2:135m"].sources[0].source == "file:/m.gguf"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        ("[" * 100_000, "aliases.json"),
        (json.dumps({"a": {}}), "sources"),
        (json.dumps({"a": {"sources": []}}), "'a' has no sources"),
        (json.dumps({"a": {"sources": [GOOD | {"sha265": ""}]}}), "sha265"),
        (json.dumps({"a": {"sources": [{"source": "file:/m.gguf"}]}}), "sha256"),
        (json.dumps({"a": {"sources": [GOOD | {"sha256": "ABC"}]}}), "sha256"),
        (json.dumps({"a": {"sources": [GOOD | {"sha256": "../" + "0" * 61}]}}), "sha256"),
        (json.dumps({"a": {"sources": [GOOD | {"bytes": -1}]}}), "bytes"),
        (json.dumps({"a": {"sources": [GOOD | {"bytes": "1"}]}}), "bytes"),
        (json.dumps({"a": {"sources": [GOOD | {"source": "pip:--pre==1/x"}]}}), "pip:--pre"),
        (json.dumps({"../a": {"sources": [GOOD]}}), "'../a'"),
        (json.dumps({"hf:a": {"sources": [GOOD]}}), "'hf:a'"),
        (json.dumps({"A b": {"sources": [GOOD]}}), "'A b'"),
    ],
)
def test_a_damaged_alias_file_is_one_line_that_names_file_and_field(home: Path, content: str, named: str) -> None:
    home.mkdir()
    (home / "aliases.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        Store().pull("a")
    assert named in str(caught.value)
    assert str(home / "aliases.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resolve_says_how_to_get_a_known_model_and_suggests_a_near_one(add_alias: Callable[..., None]) -> None:
    add_alias("tiny:1b", GOOD)
    store = Store()
    with pytest.raises(ModelNotFound, match="run: llm-os pull tiny:1b"):
        store.resolve("tiny:1b")
    with pytest.raises(ModelNotFound, match=r"did you mean tiny:1b\?"):
        store.resolve("tinny:1b")
    with pytest.raises(ModelNotFound, match="aliases: smollm2:135m, tiny:1b"):
        store.resolve("zzzzzzzz")


@pytest.mark.parametrize("model", ["", "\0", "a\nb", "a/" * 5000, "x" * 100_000, "\ud800", "~nobody-here/x", ".gguf"])
def test_a_senseless_model_is_not_found_in_one_short_line(model: str) -> None:
    for call in (Store().resolve, Store().pull, Store().remove):
        with pytest.raises(ModelNotFound) as caught:
            call(model)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_path_resolves_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    store = Store()
    assert store.resolve(str(file)) == store.pull(str(file)) == file
    assert store.resolve("./m.gguf").samefile(file)
    assert store.resolve("~/m.gguf") == file
    assert store.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LLM_OS_HOME": "/h"}, "/h/models"),
        ({"XDG_DATA_HOME": "/d", "HOME": "/u"}, "/d/llm-os/models"),
        ({"XDG_DATA_HOME": "relative", "HOME": "/u"}, "/u/.local/share/llm-os/models"),
        ({"HOME": "/u"}, "/u/.local/share/llm-os/models"),
    ],
)
def test_the_default_place_follows_the_platform(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("LLM_OS_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Store().path == Path(expected)
