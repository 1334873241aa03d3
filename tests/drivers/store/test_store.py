"""What the store keeps, shares, lists and removes; and what damaged or hostile entries cannot do to it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_os.drivers.store import Progress, Store
from llm_os.kernel.errors import ModelNotFound, StoreError

CONTENT = b"GGUF" + bytes(range(256)) * 40


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    path = tmp_path / "origin" / "m.gguf"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def tiny(origin: Path, add_alias: Callable[..., None]) -> str:
    """An alias whose source is a local file."""
    add_alias("tiny:1", {"source": f"file:{origin}", "sha256": sha256(CONTENT)})
    return "tiny:1"


def manifest_of(home: Path, model: str) -> Path:
    return next(path for path in home.glob("models/manifests/*.json") if json.loads(path.read_text())["model"] == model)


def test_nothing_is_created_before_the_first_pull(store: Store, home: Path) -> None:
    assert store.list() == ()
    with pytest.raises(ModelNotFound):
        store.resolve("smollm2:135m")
    with pytest.raises(ModelNotFound):
        store.remove("smollm2:135m")
    assert not home.exists()


def test_a_pulled_model_is_listed_resolved_and_removed(
    store: Store, tiny: str, leftovers: Callable[[], list[str]]
) -> None:
    path = store.pull(tiny)
    (listed,) = store.list()
    assert path.read_bytes() == CONTENT
    assert path.name == "m.gguf"
    assert (listed.name, listed.bytes, listed.sha256, listed.path) == (tiny, len(CONTENT), sha256(CONTENT), path)
    assert listed.pulled_at.tzinfo is not None
    assert store.resolve(tiny) == path
    assert leftovers() == []
    store.remove(tiny)
    assert store.list() == ()
    assert not path.exists()
    assert leftovers() == []
    with pytest.raises(ModelNotFound, match="llm-os pull"):
        store.resolve(tiny)


def test_a_second_pull_needs_no_source(store: Store, tiny: str, origin: Path) -> None:
    path = store.pull(tiny)
    origin.unlink()
    assert store.pull(tiny) == path


def test_models_with_the_same_content_share_bytes_until_the_last_is_removed(
    store: Store, origin: Path, add_alias: Callable[..., None], leftovers: Callable[[], list[str]]
) -> None:
    other = origin.with_name("other.gguf")
    shutil.copy(origin, other)
    add_alias("a", {"source": f"file:{origin}", "sha256": sha256(CONTENT)})
    add_alias("b", {"source": f"file:{other}", "sha256": sha256(CONTENT)})
    path = store.pull("a")
    assert store.pull("b") == path
    store.remove("a")
    assert store.resolve("b").read_bytes() == CONTENT
    store.remove("b")
    assert not path.exists()
    assert leftovers() == []


def test_a_changed_alias_replaces_the_stored_model(
    store: Store, tiny: str, origin: Path, add_alias: Callable[..., None]
) -> None:
    old = store.pull(tiny)
    origin.write_bytes(b"new")
    add_alias(tiny, {"source": f"file:{origin}", "sha256": sha256(b"new")})
    assert store.pull(tiny).read_bytes() == b"new"
    assert not old.parent.exists()


def test_the_next_source_is_tried_and_the_first_ones_failure_is_told_once(
    store: Store, origin: Path, add_alias: Callable[..., None]
) -> None:
    missing = {"source": f"file:{origin}.missing", "sha256": sha256(CONTENT)}
    add_alias("m", missing, {"source": f"file:{origin}", "sha256": sha256(CONTENT)})
    told: list[Progress] = []
    assert store.pull("m", progress=told.append).read_bytes() == CONTENT
    (note,) = [progress.note for progress in told if progress.note]
    assert "m.gguf.missing: No such file" in note
    assert "trying the next source" in note
    assert [progress.phase for progress in told][-1] == "verifying"
    assert told[-1].done_bytes == told[-1].total_bytes == len(CONTENT)


def test_when_no_source_works_every_reason_is_in_one_line(
    store: Store, origin: Path, add_alias: Callable[..., None], leftovers: Callable[[], list[str]]
) -> None:
    sources = [f"file:{origin}.missing", f"file:{origin.parent}", f"file:{origin}"]
    add_alias("m", *({"source": source, "sha256": "0" * 64} for source in sources))
    with pytest.raises(StoreError) as caught:
        store.pull("m")
    message = str(caught.value)
    assert "No such file" in message
    assert "not a plain file" in message
    assert f"sha256 is {sha256(CONTENT)} where {'0' * 64} is expected" in message
    assert "\n" not in message
    assert store.list() == ()
    assert leftovers() == []


def test_cancelling_stops_a_pull_and_leaves_nothing(
    store: Store, tiny: str, leftovers: Callable[[], list[str]]
) -> None:
    told: list[Progress] = []
    with pytest.raises(StoreError, match="cancelled"):
        store.pull(tiny, progress=told.append, cancelled=lambda: any(progress.done_bytes for progress in told))
    assert told[-1].phase == "downloading"
    assert leftovers() == []
    assert store.list() == ()


def test_a_cancelled_pull_tries_no_other_source(store: Store, origin: Path, add_alias: Callable[..., None]) -> None:
    add_alias("m", *({"source": f"file:{origin}", "sha256": sha256(CONTENT)} for _ in range(2)))
    told: list[Progress] = []
    answers = iter((False, False, False, True))  # then no longer: the second source would be let through
    with pytest.raises(StoreError, match="cancelled"):
        store.pull("m", progress=told.append, cancelled=lambda: next(answers, False))
    assert store.list() == ()


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError, ZeroDivisionError])
def test_what_the_callers_progress_raises_comes_through_and_nothing_is_left(
    store: Store, tiny: str, error: type[BaseException], leftovers: Callable[[], list[str]]
) -> None:
    def fail(progress: Progress) -> None:
        if progress.done_bytes:
            raise error

    with pytest.raises(error):
        store.pull(tiny, progress=fail)
    assert leftovers() == []
    assert store.pull(tiny).read_bytes() == CONTENT


@pytest.mark.parametrize("damage", ["truncated", "removed", "a link", "a directory"])
def test_damaged_content_is_not_resolved_and_the_next_pull_repairs_it(
    store: Store, tiny: str, origin: Path, damage: str, leftovers: Callable[[], list[str]]
) -> None:
    path = store.pull(tiny)
    path.unlink()
    if damage == "truncated":
        path.write_bytes(CONTENT[:-1])
    elif damage == "a link":
        path.symlink_to(origin)
    elif damage == "a directory":
        path.mkdir()
    with pytest.raises(ModelNotFound, match="llm-os pull tiny:1"):
        store.resolve(tiny)
    assert store.list() == ()
    assert len(store.problems()) == 1
    assert store.pull(tiny).read_bytes() == CONTENT
    assert not path.is_symlink()
    assert store.problems() == ()
    assert origin.read_bytes() == CONTENT
    assert leftovers() == []


GOOD_FILE = {"name": "m.gguf", "bytes": len(CONTENT), "sha256": sha256(CONTENT)}


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": [GOOD_FILE, GOOD_FILE | {"name": "n"}]},
        {"files": [GOOD_FILE, GOOD_FILE], "directory": True},
        {"files": [GOOD_FILE | {"name": "../../../../origin/m.gguf"}]},
        {"files": [GOOD_FILE | {"name": "/etc/hostname"}]},
        {"files": [GOOD_FILE | {"name": ".."}]},
        {"files": [GOOD_FILE | {"name": "m\0"}]},
        {"files": [GOOD_FILE | {"sha256": "x"}]},
        {"sha256": "../../../origin"},
        {"sha256": ""},
        {"model": "tiny:2"},
        {"model": "tiny:1\n"},
        {"source": "\x1b[2J"},
        {"version": 2},
        {"extra": 1},
        {"pulled_at": "yesterday"},
        None,
        b"",
        b"\xff\xfe",
        b"{",
        b"[" * 200_000,
        b'"' + b"x" * (5 << 20) + b'"',
    ],
)
def test_a_damaged_manifest_breaks_neither_listing_nor_pulling(
    store: Store,
    tiny: str,
    home: Path,
    origin: Path,
    add_alias: Callable[..., None],
    change: dict[str, object] | bytes | None,
) -> None:
    path = store.pull(tiny)
    other = origin.with_name("other.gguf")
    other.write_bytes(b"other")
    add_alias("other", {"source": f"file:{other}", "sha256": sha256(b"other")})
    store.pull("other")
    manifest = manifest_of(home, tiny)
    if change is None:
        manifest.unlink()
        manifest.symlink_to(origin)
    elif isinstance(change, bytes):
        manifest.write_bytes(change)
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    assert [model.name for model in store.list()] == ["other"]
    (problem,) = store.problems()
    assert "\n" not in problem
    assert "\x1b" not in problem
    with pytest.raises(ModelNotFound):
        store.resolve(tiny)
    store.remove("other")
    assert store.pull(tiny) == path
    assert store.problems() == ()
    assert origin.read_bytes() == CONTENT


def test_a_damaged_entry_can_be_removed_and_its_bytes_go_with_the_next_pull(
    store: Store, tiny: str, home: Path, add_alias: Callable[..., None], leftovers: Callable[[], list[str]]
) -> None:
    store.pull(tiny)
    manifest_of(home, tiny).write_bytes(b"junk")
    store.remove(tiny)
    assert store.problems() == ()
    assert leftovers() == []


def test_content_named_by_a_manifest_of_a_later_version_is_kept(
    store: Store, tiny: str, home: Path, origin: Path, add_alias: Callable[..., None]
) -> None:
    path = store.pull(tiny)
    manifest = manifest_of(home, tiny)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 2}))
    origin.write_bytes(b"other")
    add_alias("other", {"source": f"file:{origin}", "sha256": sha256(b"other")})
    store.pull("other")
    store.remove("other")
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("linked", ["content", "manifests", "partial"])
def test_a_link_inside_the_store_leads_no_write_out_of_it(
    store: Store, tiny: str, home: Path, tmp_path: Path, linked: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    (home / "models").mkdir()
    (home / "models" / linked).symlink_to(outside)
    with pytest.raises(StoreError, match="is a link"):
        store.pull(tiny)
    assert [path.name for path in outside.iterdir()] == ["kept"]


def test_links_among_partial_and_content_are_removed_and_not_followed(
    store: Store, tiny: str, home: Path, tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    for place in ("partial/dead-0123.abc", f"content/{sha256(CONTENT)}", f"content/{'0' * 64}"):
        link = home / "models" / place
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(outside)
    assert store.pull(tiny).read_bytes() == CONTENT
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert leftovers() == []


def test_content_that_was_replaced_by_a_link_is_not_resolved(
    store: Store, tiny: str, tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    path = store.pull(tiny)
    path.parent.rename(tmp_path / "outside")
    path.parent.symlink_to(tmp_path / "outside")
    with pytest.raises(ModelNotFound, match="llm-os pull"):
        store.resolve(tiny)
    assert store.pull(tiny) == path
    assert not path.parent.is_symlink()
    assert (tmp_path / "outside" / path.name).read_bytes() == CONTENT
    assert leftovers() == []


def test_the_store_itself_may_be_a_link_to_another_disk(store: Store, tiny: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (home / "models").symlink_to(tmp_path / "disk")
    assert store.pull(tiny).read_bytes() == CONTENT


def test_a_source_larger_than_the_free_space_is_refused_before_it_is_copied(
    store: Store, tmp_path: Path, add_alias: Callable[..., None], leftovers: Callable[[], list[str]]
) -> None:
    huge = tmp_path / "huge.gguf"
    with huge.open("wb") as file:
        try:
            file.truncate(shutil.disk_usage(tmp_path).total + (1 << 30))
        except OSError as error:
            pytest.skip(f"no sparse file of that size here: {error}")
    add_alias("huge", {"source": f"file:{huge}", "sha256": "0" * 64}, {"source": "file:/x", "sha256": "0" * 64})
    with pytest.raises(StoreError, match=r"^file:.* needs .* MB are free in .*; free some space or set LLM_OS_HOME"):
        store.pull("huge")
    assert leftovers() == []


def test_a_store_that_cannot_be_written_says_so_in_one_line(tmp_path: Path, tiny: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/models cannot be written: Not a directory; set LLM_OS_HOME"):
        Store(tmp_path / "file" / "models").pull(tiny)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no FIFOs")
def test_a_fifo_in_place_of_a_file_or_manifest_blocks_nothing(
    store: Store, tiny: str, home: Path, origin: Path, add_alias: Callable[..., None]
) -> None:
    store.pull(tiny)
    manifest = manifest_of(home, tiny)
    manifest.unlink()
    os.mkfifo(manifest)
    assert store.list() == ()
    assert store.pull(tiny).read_bytes() == CONTENT
    fifo = origin.with_name("fifo")
    os.mkfifo(fifo)
    add_alias("fifo", {"source": f"file:{fifo}", "sha256": "0" * 64})
    with pytest.raises(StoreError, match="not a plain file"):
        store.pull("fifo")
