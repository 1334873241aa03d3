"""State directories that cannot be used, and disks that are full while the kernel runs: one clear line, and it goes on
when there is room."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest

import llm_os
from llm_os.drivers.persistence import FileLog


def config(state: Path, **fields: Any) -> llm_os.Config:
    return llm_os.Config(driver="sim", memory="16MiB", frame_size="64KiB", state=state, **fields)


def ask(max_tokens: int = 20) -> llm_os.Request:
    sampling = llm_os.Sampling(max_tokens=max_tokens, temperature=0)
    return llm_os.Request(model="sim:a?kv_bytes_per_token=1024", prompt="hello", sampling=sampling)


def refusal(state: Path, **fields: Any) -> str:
    """The one line that booting with this state directory gives."""
    with pytest.raises(llm_os.StoreError) as caught:
        llm_os.Kernel(config(state, **fields))
    [line] = str(caught.value).splitlines()
    assert str(state) in line
    return line


def fill(ballast: Path) -> None:
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_of_two_kernels_on_one_state_directory_the_second_is_told_who_has_it(tmp_path: Path) -> None:
    with llm_os.Kernel(config(tmp_path)) as first:
        assert "is in use by process" in refusal(tmp_path)
        assert len(first.stream(ask()).result().token_ids) == 20
    llm_os.Kernel(config(tmp_path)).close()


def test_a_file_in_the_place_of_a_state_directory_is_named(tmp_path: Path) -> None:
    place = tmp_path / "state"
    place.write_text("precious")
    for state in (place, place / "below"):
        assert f"{place} is a file; move it, or give another directory" in refusal(state)
    assert place.read_text() == "precious"


def test_a_file_that_is_no_journal_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b"what is this" * 10)
    assert "journal" in refusal(tmp_path)
    assert (tmp_path / "journal").read_bytes() == b"what is this" * 10


def test_a_journal_that_is_damaged_at_its_end_is_used_and_the_host_is_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with llm_os.Kernel(config(tmp_path)):
        pass
    with (tmp_path / "journal").open("ab") as file:
        file.write(b"damage")
    with llm_os.Kernel(config(tmp_path)):
        pass
    (warning,) = [record for record in caplog.records if record.name == "llm_os.state"]
    assert warning.levelname == "WARNING"
    assert warning.getMessage().startswith(f"6 bytes at the end of {tmp_path / 'journal'} are no whole records")
    assert [path.read_bytes() for path in tmp_path.glob("journal.damaged-*")] == [b"damage"]


def test_a_journal_of_a_later_version_is_refused_and_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_os.drivers.persistence import groups

    with monkeypatch.context() as patch:
        patch.setattr(groups, "VERSION", groups.VERSION + 1)
        FileLog(tmp_path).close()
    later = (tmp_path / "journal").read_bytes()
    assert "version" in refusal(tmp_path)
    assert (tmp_path / "journal").read_bytes() == later


@pytest.mark.skipif(sys.platform == "win32", reason="has no read-only folders")
def test_a_state_directory_that_cannot_be_written_is_named(tmp_path: Path, tmpfs: Any) -> None:
    with tmpfs(tmp_path / "disk", "size=64k,ro") as disk:
        assert "Read-only file system" in refusal(disk / "state")
        assert "Read-only file system" in refusal(disk)


def test_booting_on_a_full_disk_says_so(tmp_path: Path, tmpfs: Any) -> None:
    with tmpfs(tmp_path / "disk", "size=64k") as disk:
        (disk / "state").mkdir()
        fill(disk / "ballast")
        assert "No space left on device" in refusal(disk / "state")
        (disk / "ballast").unlink()
        llm_os.Kernel(config(disk / "state")).close()


def test_a_disk_that_fills_up_ends_the_sessions_and_the_kernel_serves_again_once_there_is_room(
    tmp_path: Path, tmpfs: Any
) -> None:
    with tmpfs(tmp_path / "disk", "size=256k") as disk, llm_os.Kernel(config(disk / "state")) as kernel:
        heard = len(kernel.stream(ask()).result().token_ids)
        streams = [kernel.stream(ask(2000)) for _ in range(3)]
        for stream in streams:
            next(stream)
        fill(disk / "ballast")
        for stream in streams:
            with pytest.raises(
                llm_os.StoreError, match=r"the journal in .*state failed: No space left on device; mend"
            ):
                for chunk in stream:
                    heard += len(chunk.token_ids)
        assert kernel.ps() == [] and kernel.memory().kv == 0
        (disk / "ballast").unlink()
        assert len(kernel.stream(ask()).result().token_ids) == 20
        kernel.close()
        with llm_os.Kernel(config(disk / "state")) as after:
            assert after.recovered == ()
            assert len(after.stream(ask()).result().token_ids) == 20
