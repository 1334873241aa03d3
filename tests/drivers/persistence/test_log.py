"""The journal in a folder: what is written is read again, whatever happened to the end of the file."""

from __future__ import annotations

import errno
import stat
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llm_os.drivers.persistence import FileLog, LocalFiles
from llm_os.kernel.errors import StoreError
from llm_os.kernel.journal import Began, Done, Given, Record, Reniced, Took, replay
from llm_os.kernel.request import Request, Sampling, TokenLogprob

HEADER = 32
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
pids = st.integers(1, 4)
logprobs = st.lists(st.tuples(st.floats(max_value=0), st.just(((3, -1.5),))), max_size=2).map(tuple)
requests = st.builds(
    Request,
    model=st.text(max_size=9),
    messages=st.just([{"role": "user", "content": [{"type": "text", "text": "é\0"}]}]),
    tenant=st.text(max_size=3),
    sampling=st.builds(Sampling, seed=st.integers(0, 2**64 - 1), logit_bias=st.just({7: -1.25})),
)
records = st.one_of(
    st.builds(Began, pids, requests, st.integers(0, 2**64 - 1), tokens),
    st.builds(Took, pids, tokens, logprobs),
    st.builds(Given, pids, tokens),
    st.builds(Done, pids),
    st.builds(Reniced, pids, st.integers(-20, 19)),
)
groups = st.lists(st.lists(records, min_size=1, max_size=4), max_size=12)


def flat(groups: list[list[Record]]) -> list[Record]:
    return [record for group in groups for record in group]


def written(folder: Path, groups: list[list[Record]]) -> tuple[bytes, list[int]]:
    """The file, and where each group ends in it."""
    log, path, ends = FileLog(folder, compact_above=2**40), folder / "journal", list[int]()
    for group in groups:
        log.append(group)
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    log.close()
    return data, ends


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lambda: tmp_path_factory.mktemp("state")


everything = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@everything
@given(groups=groups, small=st.sampled_from([0, 200, 2**20]))
def test_every_life_begins_where_the_last_one_ended(folder: Any, groups: list[list[Record]], small: int) -> None:
    place, told = folder(), list[list[Record]]()
    for group in groups:
        log = FileLog(place, compact_above=small)
        assert (log.sessions, log.lost_bytes) == (replay(flat(told)), 0)
        assert log.last_pid == max((record.pid for record in flat(told)), default=0)
        for part in (group, group[:1]):
            log.append(part)
            told.append(part)
        log.close()
    log = FileLog(place)
    assert list(log.sessions.items()) == list(replay(flat(told)).items())
    log.close()


@everything
@given(groups=groups, place=st.floats(0, 1), flip=st.integers(0, 255))
@example(groups=[[Began(1, Request(model="m", prompt=[1]), 0, ())]], place=0.0, flip=1)  # a length beyond the end
def test_a_log_that_is_cut_or_damaged_anywhere_is_the_groups_before_that(
    folder: Any, groups: list[list[Record]], place: float, flip: int
) -> None:
    state = folder()
    data, ends = written(state, groups)
    at = HEADER + int(place * (len(data) - HEADER))
    whole = [group for group, end in zip(groups, ends, strict=True) if end <= at]
    damaged = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :] if flip and at < len(data) else data[:at]
    (state / "journal").write_bytes(damaged)
    log = FileLog(state)
    assert log.sessions == replay(flat(whole))
    assert log.lost_bytes == len(damaged) - ([HEADER, *ends][len(whole)])
    log.append([Took(99, (1,))])
    log.close()
    again = FileLog(state)
    assert (again.sessions, again.lost_bytes) == (replay(flat(whole)), 0)
    again.close()


@pytest.mark.parametrize("at", range(HEADER))
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_header_is_refused_and_the_file_left_alone(tmp_path: Path, at: int, cut: bool) -> None:
    data, _ = written(tmp_path, [[Done(1)]])
    damaged = data[:at] if cut else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    path = tmp_path / "journal"
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"; (use a newer one, or )?move it away to start without its sessions$"):
        FileLog(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal"]
    assert path.read_bytes() == damaged


def test_what_is_cut_off_is_kept_beside_the_journal_and_told(tmp_path: Path) -> None:
    data, (first, *_) = written(
        tmp_path, [[Began(1, Request(model="m", prompt=[1]), 0, (1,))], [Took(1, (2,))], [Done(1)]]
    )
    damaged = bytearray(data)
    damaged[first + 8] ^= 1
    (tmp_path / "journal").write_bytes(damaged)
    log = FileLog(tmp_path)
    (aside,) = tmp_path.glob("journal.damaged-*")
    assert aside.read_bytes() == damaged[first:]
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    assert list(log.sessions) == [1]
    lost = f"{len(data) - first} bytes at the end of {tmp_path / 'journal'}"
    assert log.warning.startswith(lost) and f"{len(data) - first} of the bytes are kept in {aside}" in log.warning
    log.close()
    again = FileLog(tmp_path)
    assert again.warning == "" and aside.exists()
    again.close()


def test_what_is_kept_of_damaged_journals_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_os.drivers.persistence.log._ASIDE_BYTES", 10)
    for _ in range(12):
        log = FileLog(tmp_path)
        log.append([Took(1, (2,))])
        log.close()
        with (tmp_path / "journal").open("ab") as file:
            file.write(b"\1" * 100)
    log = FileLog(tmp_path)
    assert "100 bytes at the end" in log.warning and "; sessions go on" in log.warning
    log.close()
    kept = list(tmp_path.glob("journal.damaged-*"))
    assert len(kept) == 4 and {path.stat().st_size for path in kept} == {10}


class Full(LocalFiles):
    """A disk without room for what is kept aside."""

    def create(self, path: Path) -> Any:
        if "damaged" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().create(path)


def test_a_journal_whose_damage_cannot_be_kept_stays_as_it_was(tmp_path: Path) -> None:
    data, _ = written(tmp_path, [[Took(1, (2,))]])
    (tmp_path / "journal").write_bytes(data + b"damage")
    with pytest.raises(StoreError, match="failed: No space left on device; mend the disk, or give another directory"):
        FileLog(tmp_path, Full())
    assert (tmp_path / "journal").read_bytes() == data + b"damage"


def test_a_journal_of_a_later_version_is_refused(tmp_path: Path) -> None:
    data, _ = written(tmp_path, [])
    (tmp_path / "journal").write_bytes(data[:8] + (2).to_bytes(4, "little") + b"whatever else that version has")
    with pytest.raises(StoreError, match="has version 2, and this llm-os reads 1; use a newer one"):
        FileLog(tmp_path)


def test_a_group_of_an_earlier_file_at_the_right_place_is_no_group(tmp_path: Path) -> None:
    """As where a file system gives a new file the old blocks: the checksums match, but not after this header."""
    written(tmp_path, [[Done(1)]])
    old, _ = written(tmp_path, [[Done(1)]])  # now nothing but the generation differs in the headers
    new, _ = written(tmp_path, [])
    (tmp_path / "journal").write_bytes(new + old[len(new) :])
    log = FileLog(tmp_path)
    assert (log.last_pid, log.lost_bytes) == (1, len(old) - len(new))
    log.close()


def test_the_greatest_pid_is_known_when_all_sessions_have_ended_and_the_file_was_rewritten(tmp_path: Path) -> None:
    request = Request(model="m", prompt=[1])
    for life in range(3):
        log = FileLog(tmp_path, compact_above=0)
        assert log.last_pid == 70 * life
        log.append([Began(70 * (life + 1), request, 0, (1,))])
        log.append([Done(70 * (life + 1))])
        log.append([Took(5, (1,))])
        log.close()


def test_the_file_stays_within_its_bound_however_long_the_log_lives(tmp_path: Path) -> None:
    request = Request(model="m", prompt=[1])
    log, path = FileLog(tmp_path, compact_above=2000), tmp_path / "journal"
    log.append([Began(1, request, 0, tuple(range(100)))])
    live = path.stat().st_size
    for pid in range(2, 800):
        log.append([Began(pid, request, 0, (1,)), Took(pid, (2,)), Took(1, (3,)), Done(pid)])
        live += 21
        assert path.stat().st_size <= max(2000, 4 * live) + 200
    assert path.stat().st_size < 60_000
    log.close()


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (Took(7, (object(),)), "object"),  # type: ignore[arg-type]
        (Given(7, (2**64,)), "64"),
        (Began(7, Request(model="\ud800", prompt=""), 0, ()), "surrogates"),
        (Began(7, Request(model="m", messages=[{"role": {TokenLogprob(1, 0.0): 1}}]), 0, ()), "hash"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, record: Record, why: str) -> None:
    log = FileLog(tmp_path)
    before = (tmp_path / "journal").read_bytes()
    with pytest.raises(StoreError, match=f"process 7 cannot be journaled: .*{why}"):
        log.append([Done(1), record])
    assert (tmp_path / "journal").read_bytes() == before
    log.close()


def test_records_that_only_another_version_understands_are_refused_not_dropped(tmp_path: Path) -> None:
    data, _ = written(tmp_path, [[Given(1, (2, 3))]])
    payload = data[HEADER + 8 :].replace(b"\x93\x02\x01", b"\x93\x07\x01")  # a tag that does not exist
    crc = zlib.crc32(payload, zlib.crc32(len(payload).to_bytes(4, "little"), int.from_bytes(data[28:32], "little")))
    damaged = data[: HEADER + 4] + crc.to_bytes(4, "little") + payload
    (tmp_path / "journal").write_bytes(damaged)
    with pytest.raises(StoreError, match=r"journal has records of another version at byte 32 .*; move it away"):
        FileLog(tmp_path)
    assert (tmp_path / "journal").read_bytes() == damaged


def test_files_and_folder_are_the_owners_alone_and_closing_leaves_only_the_journal(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    log = FileLog(folder)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    log.close()
    log.close()
    assert [path.name for path in folder.iterdir()] == ["journal"]
    with pytest.raises(StoreError, match="is closed"):
        log.append([Done(1)])


def test_folders_that_are_made_are_durable(tmp_path: Path) -> None:
    synced: list[Path] = []

    class Watched(LocalFiles):
        def sync_folder(self, path: Path) -> None:
            synced.append(path)
            super().sync_folder(path)

    Watched().make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"] and (tmp_path / "a" / "b").is_dir()
    Watched().make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2


def test_a_journal_is_not_followed_to_where_a_link_leads(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    data, _ = written(tmp_path / "state", [])
    elsewhere.write_bytes(data)
    (tmp_path / "state" / "journal").unlink()
    (tmp_path / "state" / "journal").symlink_to(elsewhere)
    with pytest.raises(StoreError, match=r"the journal in .* failed: Too many levels of symbolic links"):
        FileLog(tmp_path / "state")


def test_a_state_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StoreError, match=r"the state directory .*state cannot be: .*state is a file; move it"):
        FileLog(tmp_path / "state")
