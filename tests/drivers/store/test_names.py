"""Nothing from outside becomes a path, URL or argument that reaches beyond where it belongs."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_os.drivers.store import names
from llm_os.kernel.errors import StoreError

HOSTILE = [
    "",
    ".",
    "..",
    "...",
    "../x.gguf",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "..\\x",
    "C:x",
    "C:\\x",
    "\\\\host\\share",
    "x\0.gguf",
    "x\n.gguf",
    "x\x1b[2J",
    "‮gguf.x",
    "con",
    "CON.gguf",
    "nul",
    "COM1.safetensors",
    "lpt9",
    "conin$",
    "x.gguf:stream",
    "x.",
    "x ",
    " x",
    ".hidden",
    "-rf",
    "~root",
    "*",
    "a?b",
    "a|b",
    "x" * 201,
    "é" * 101,
    "\ud800",
]
ANYTHING = st.text(st.characters(codec=None), max_size=300) | st.text(alphabet="./\\:~ -aC\0", max_size=12)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_name_is_refused(name: str) -> None:
    with pytest.raises(StoreError) as caught:
        names.file_name(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name", ["SmolLM2-135M-Instruct.Q4_1.gguf", "model-00001-of-00002.safetensors", "Mein Modell (1).gguf", "模型.gguf"]
)
def test_an_ordinary_file_name_is_kept(name: str) -> None:
    assert names.file_name(name) == name


@given(ANYTHING)
@example("aux")
def test_an_accepted_file_name_is_one_plain_part_on_every_system(name: str) -> None:
    try:
        names.file_name(name)
    except StoreError:
        return
    assert Path("/store", name).resolve().parent == Path("/store")
    windows = PureWindowsPath("C:\\store") / name
    assert windows.parent == PureWindowsPath("C:\\store")
    assert windows.name == name
    assert name.isprintable()


@given(ANYTHING)
@example("CON")
@example("../..")
def test_the_key_of_any_model_is_a_plain_file_name_of_its_own(model: str) -> None:
    key = names.key(model)
    assert re.fullmatch(r"[a-z0-9-]{1,48}-[0-9a-f]{16}", key)
    assert names.file_name(f"{key}.json")
    assert names.key(model + "x") != key


def test_sources_are_parsed() -> None:
    assert names.source("pip:llm-x==0.1.2/pkg/m.gguf") == names.Wheel("llm-x", "0.1.2", "pkg/m.gguf")
    assert names.source("hf:org/repo") == names.Hub("org/repo", None)
    assert names.source("hf:org/re.po-1/sub/m.gguf") == names.Hub("org/re.po-1", "sub/m.gguf")
    assert names.source("file:/models/m.gguf") == names.Local("/models/m.gguf")


@pytest.mark.parametrize(
    "text",
    [
        "pip:",
        "pip:x",
        "pip:x==1",
        "pip:x==1/",
        "pip:-rx==1/a",
        "pip:--index-url=http://h==1/a",
        "pip:x @ http://h/x.whl==1/a",
        "pip:x[extra]==1/a",
        "pip:x==1;python_version>'3'/a",
        "pip:x==1 --pre/a",
        "pip:x== 1/a",
        "pip:x==-1/a",
        "pip:x\n--pre==1/a",
        "pip:x==1/../a",
        "pip:x==1//a",
        "pip:x==1/a/./b",
        "pip:x==1/a\\b",
        "pip:ｘ==1/a",
        "hf:",
        "hf:org",
        "hf:org/",
        "hf:../repo",
        "hf:org/..",
        "hf:org/a..b",
        "hf:org/re po",
        "hf:org/repo?x",
        "hf:org/repo#x",
        "hf:org@h/repo",
        "hf:org/repo/",
        "hf:org/repo/../x",
        "hf:org/repo//x",
        "hf:org/repo/%2e%2e\\x",
        "hf:org/repo/a\0",
        "http://host/x",
        "file:",
        "file:a\nb",
        "",
    ],
)
def test_a_malformed_source_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(StoreError) as caught:
        names.source(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=60).map(lambda text: "pip:" + text) | st.from_regex(r"pip:.{0,20}==.{0,20}/.{0,20}"))
def test_no_wheel_source_can_become_an_option_or_another_requirement(text: str) -> None:
    try:
        wheel = names.source(text)
    except StoreError:
        return
    assert isinstance(wheel, names.Wheel)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9A-Za-z][0-9A-Za-z.!+_-]*", f"{wheel.dist}=={wheel.version}")
    assert not any(part in ("", ".", "..") for part in wheel.member.split("/"))
