"""`llm-os pull`, `models`, `rm` and `doctor`, on a store that an alias file of the user's fills from local files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest


@pytest.fixture
def tiny(tmp_path, environment) -> Path:
    """A file that the alias tiny:1 stands for."""
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"GGUF" + bytes(3_000_000))
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    home = Path(environment["LLM_OS_HOME"])
    home.mkdir()
    alias = {"sources": [{"source": f"file:{source}", "sha256": sha256, "bytes": source.stat().st_size}]}
    (home / "aliases.json").write_text(json.dumps({"tiny:1": alias}))
    return source


def test_pull_prints_the_path_and_models_lists_it(run, tiny):
    pulled = run("pull", "tiny:1")
    assert pulled.returncode == 0
    path = Path(pulled.stdout.rstrip("\n"))
    assert path.read_bytes() == tiny.read_bytes()
    listed = run("models")
    assert listed.returncode == 0
    for text in ("tiny:1", "3.0 MB", f"file:{tiny}", str(path), "smollm2:135m"):
        assert text in listed.stdout
    assert listed.stderr == ""


def test_a_pull_tells_its_progress_in_plain_lines_where_no_one_watches(run, tiny):
    pulled = run("pull", "tiny:1")
    assert "\r" not in pulled.stderr and "\x1b" not in pulled.stderr
    assert "tiny:1 is in the store, 3.0 MB" in pulled.stderr


def test_models_json_is_one_object(run, tiny):
    assert json.loads(run("models", "--json").stdout)["models"] == []
    path = run("pull", "tiny:1").stdout.rstrip("\n")
    report = json.loads(run("models", "--json").stdout)
    (model,) = report["models"]
    assert list(model) == ["name", "bytes", "sha256", "source", "path", "pulled_at"]
    assert (model["name"], model["bytes"], model["path"]) == ("tiny:1", 3_000_004, path)
    assert set(report["aliases"]) == {"smollm2:135m", "tiny:1"}


def test_rm_removes_what_is_there_and_says_what_is_not(run, tiny):
    path = Path(run("pull", "tiny:1").stdout.rstrip("\n"))
    done = run("rm", "tiny:1", "other:1")
    assert done.returncode == 1
    assert "removed tiny:1, 3.0 MB" in done.stderr and "'other:1'" in done.stderr
    assert done.stderr.count("\n") == 2
    assert not path.exists()
    assert run("rm", "tiny:1").returncode == 1


def test_a_run_pulls_first_what_is_not_there(run, tiny, sim):
    """The file is no model, which is found once it is here."""
    done = run("run", "tiny:1", "hi", *sim)
    assert done.returncode == 1
    assert "llm-os: " in done.stderr
    assert [model["name"] for model in json.loads(run("models", "--json").stdout)["models"]] == ["tiny:1"]


def test_a_source_that_fails_its_hash_is_one_line_and_leaves_nothing(run, tiny, environment):
    tiny.write_bytes(b"GGUF" + bytes(2_999_999) + b"x")
    done = run("pull", "tiny:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "sha256" in done.stderr.splitlines()[-1]
    assert list((Path(environment["LLM_OS_HOME"]) / "models" / "content").iterdir()) == []


def test_doctor_tells_what_was_found(run):
    done = run("doctor")
    assert done.returncode == 0
    for text in ("python", "torch", "cpu", "cuda", "store", "plugins"):
        assert text in done.stdout
    assert done.stderr == ""


def test_doctor_json_has_the_same_for_programs(run, environment):
    report = json.loads(run("doctor", "--json").stdout)
    assert {driver["driver"] for driver in report["drivers"]} >= {"cpu", "cuda", "sim"}
    assert report["store"]["path"] == str(Path(environment["LLM_OS_HOME"]) / "models")
    assert report["torch"] and report["python"] and report["llm_os"]


def test_doctor_names_what_is_wrong_and_the_way_out(run, environment, tmp_path):
    for name in ("torchvision", "triton"):
        (tmp_path / "extra" / name).mkdir(parents=True)
        (tmp_path / "extra" / name / "__init__.py").touch()
    home = tmp_path / "a-file"
    home.touch()
    done = run("doctor", PYTHONPATH=str(tmp_path / "extra"), LLM_OS_HOME=str(home))
    assert done.returncode == 1
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    for text in ("pip uninstall torchvision", "pip uninstall triton", "LLM_OS_HOME"):
        assert any(text in line for line in problems), problems
