"""Compiled code is kept for the next run, and only what is ours is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_os.drivers.native import kernels
from llm_os.drivers.native.kernels import Kernels, Sizes
from llm_os.drivers.native.processor import Processor

SIZES = Sizes(head_dim=16, group=1, rope_dims=(), qk_norm=False, activation="silu", kinds=())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_OS_HOME", str(tmp_path))
    return tmp_path / "native"


@pytest.fixture(scope="module")
def code() -> bytes:
    return kernels._compile(SIZES, Processor())


@pytest.fixture(autouse=True)
def compiled(code: bytes, monkeypatch: pytest.MonkeyPatch) -> list[Sizes]:
    """The sizes that were compiled: really only once, which takes a second."""
    sizes: list[Sizes] = []
    monkeypatch.setattr(kernels, "_compile", lambda each, processor: (sizes.append(each), code)[1])
    return sizes


def test_a_second_run_reads_what_the_first_has_compiled(folder: Path, compiled: list[Sizes]) -> None:
    first, second = Kernels(SIZES, Processor()), Kernels(SIZES, Processor())
    assert len(compiled) == 1
    assert second.codes == first.codes
    (file,) = folder.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", b"x" * 5000])
def test_a_damaged_file_is_compiled_again_and_replaced(folder: Path, compiled: list[Sizes], damage: bytes) -> None:
    Kernels(SIZES, Processor())
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    Kernels(SIZES, Processor())
    assert len(compiled) == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_is_not_run(folder: Path, compiled: list[Sizes], mode: int) -> None:
    Kernels(SIZES, Processor())
    (file,) = folder.iterdir()
    file.chmod(mode)
    Kernels(SIZES, Processor())
    assert len(compiled) == 2
    assert file.stat().st_mode & 0o077 == 0


def test_code_for_another_processor_or_other_sizes_is_not_taken(folder: Path, compiled: list[Sizes]) -> None:
    Kernels(SIZES, Processor())
    Kernels(SIZES, Processor("haswell"))
    Kernels(Sizes(head_dim=32, group=1, rope_dims=(), qk_norm=False, activation="silu", kinds=()), Processor())
    assert len(compiled) == 3
    assert len(list(folder.iterdir())) == 3


def test_where_nothing_can_be_kept_code_is_compiled_each_time(folder: Path, compiled: list[Sizes]) -> None:
    folder.write_text("a file, where a folder should be")
    Kernels(SIZES, Processor())
    Kernels(SIZES, Processor())
    assert len(compiled) == 2


def test_only_the_latest_files_stay(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    for number in range(40):
        (folder / f"{number}.o").write_bytes(b"old")
    Kernels(SIZES, Processor())
    assert len(list(folder.iterdir())) == kernels._KEPT
