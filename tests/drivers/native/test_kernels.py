"""Compiled code is kept for the next run, and only what this user left there unharmed is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_os.drivers.native import kernels
from llm_os.drivers.native.kernels import Kernels, Sizes
from llm_os.drivers.native.processor import Processor

SIZES = Sizes(head_dim=16, group=1, rope_dims=(), qk_norm=False, activation="silu", kinds=())


class Compiler:
    """Counts what is compiled. What comes of it is the same every time, so it is done once."""

    made: dict[Sizes, bytes] = {}

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        compile = kernels._compile

        def counted(sizes: Sizes, processor: Processor) -> bytes:
            self.count += 1
            if sizes not in self.made:
                self.made[sizes] = compile(sizes, processor)
            return self.made[sizes]

        monkeypatch.setattr(kernels, "_compile", counted)

    def open(self, sizes: Sizes = SIZES) -> int:
        """How much had to be compiled for these sizes."""
        before = self.count
        assert Kernels(sizes, Processor()).run
        return self.count - before


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    monkeypatch.setattr(kernels, "home", lambda kind: tmp_path / kind)
    return Compiler(monkeypatch)


@pytest.fixture
def file(compiler: Compiler, tmp_path: Path) -> Path:
    """What is kept for SIZES."""
    assert compiler.open() == 1
    (kept,) = (tmp_path / "cache" / "native").iterdir()
    return kept


def test_what_was_compiled_is_read_again(compiler, file):
    assert compiler.open() == 0


def test_other_sizes_and_other_processors_have_code_of_their_own(compiler, file):
    assert compiler.open(Sizes(head_dim=32, group=1, rope_dims=(), qk_norm=False, activation="silu", kinds=())) == 1
    assert compiler.open(Sizes(head_dim=16, group=1, rope_dims=(), qk_norm=True, activation="silu", kinds=())) == 1
    keys = {kernels._key(SIZES, Processor(name)) for name in (None, "haswell", "alderlake")}
    assert len(keys) == 3


def test_code_that_was_damaged_is_not_run(compiler, file):
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:500] + b"\0" + whole[501:]):
        file.write_bytes(damaged)
        assert compiler.open() == (damaged != whole)
        assert file.read_bytes() == whole


@pytest.mark.parametrize("mode", [0o666, 0o660, 0o602])
def test_code_that_others_could_have_written_is_not_run(compiler, file, mode):
    file.chmod(mode)
    assert compiler.open() == 1
    assert compiler.open() == 0  # written anew, for nobody else


def test_code_of_another_user_is_not_run(compiler, file, monkeypatch):
    monkeypatch.setattr(kernels.os, "getuid", lambda: 12345)
    assert compiler.open() == 1


def test_nothing_is_kept_where_nothing_can_be(compiler, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    assert compiler.open() == 1
    assert compiler.open() == 1


def test_old_code_goes(compiler, file, monkeypatch):
    monkeypatch.setattr(kernels, "_KEPT", 3)
    for head_dim in (32, 48, 64, 80):
        compiler.open(Sizes(head_dim=head_dim, group=1, rope_dims=(), qk_norm=False, activation="silu", kinds=()))
    assert len(list(file.parent.iterdir())) == 3
    assert compiler.open() == 1
