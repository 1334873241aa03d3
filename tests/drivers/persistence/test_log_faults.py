"""Whatever fails, and whenever the power goes: what was acknowledged is there, and what was refused is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_os.drivers.persistence import FileLog
from llm_os.kernel.errors import StoreError
from llm_os.kernel.journal import Record, Session, replay

FOLDER = Path("/state")
KINDS = ("EIO", "ENOSPC", "late", "short", "dead", "cut", "late cut")
SMALL = 300  # bytes; the story below makes the log rewrite itself several times


class Witness:
    """Writes a story into a log on a disk, and knows what the log must say afterwards."""

    def __init__(self, disk: Any) -> None:
        self.disk = disk
        self.kept: list[Record] = []
        self.doubtful: list[list[Record]] = []  # refused, or under way when the power went, and nothing kept since
        self.refused = 0
        self.log: FileLog | None = None

    def tell(self, groups: list[list[Record]]) -> None:
        for number, group in enumerate(groups):
            if number == len(groups) // 2 and self.log is not None:
                self.log.close()
                self.log = None
            self.append(group)

    def append(self, group: list[Record]) -> None:
        try:
            if self.log is None:
                self.log = FileLog(FOLDER, self.disk, SMALL)
                self.check(self.log)
            self.doubtful.append(group)
            self.log.append(group)
        except StoreError:
            self.refused += 1
        else:
            self.kept += group
            self.doubtful = []

    def check(self, log: FileLog) -> None:
        """It says what was kept, and perhaps one group that nobody was promised is not there."""
        possible = {len(self.kept): self.kept, **{i: self.kept + group for i, group in enumerate(self.doubtful, -99)}}
        fits = [records for records in possible.values() if replay(records) == log.sessions]
        assert fits, (log.sessions, replay(self.kept))
        assert log.last_pid >= max((record.pid for record in self.kept), default=0)
        self.kept = fits[0]
        self.doubtful = []

    def sessions(self) -> dict[int, Session]:
        return replay(self.kept)


def run(disk: Any, groups: list[list[Record]], power_cut: type[BaseException]) -> Witness:
    witness = Witness(disk)
    try:
        witness.tell(groups)
    except power_cut:
        return witness
    assert witness.refused <= disk.hit * len(groups)
    disk.heal()
    witness.append(groups[0])  # where nothing fails any more, it must get in
    witness.append(groups[1])
    assert witness.doubtful == []
    return witness


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_log_keeps_its_word_when_any_one_operation_fails(
    kind: str, seed: int, disk: Any, story: Any, power_cut: type[BaseException]
) -> None:
    for number in range(10_000):
        faulty = disk({number: kind}, seed)
        witness = run(faulty, story(seed), power_cut)
        renames = faulty.log.count("rename")
        after = faulty.after_power_cut()
        log = FileLog(FOLDER, after)
        witness.check(log)
        log.append(story(seed)[2])
        if not faulty.hit:
            assert renames > 4, "the story is too short for the log to rewrite itself"
            break
    else:
        pytest.fail("no run without a fault")


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "late", "short"])
def test_a_refused_group_is_not_there_after_a_power_cut_if_the_disk_works_again(
    kind: str, disk: Any, story: Any
) -> None:
    """One failure, and everything after it works: then nothing is in doubt, not even until the next append."""
    group, tail = story(0)[0], story(0)[1]
    refusals = 0
    for number in range(100):
        faulty = disk()
        log = FileLog(FOLDER, faulty)
        log.append(group)
        faulty.faults = {faulty.count + number: kind}
        try:
            log.append(tail)
        except StoreError:
            refusals += 1
            for _ in range(8):  # whatever chance makes of it
                assert FileLog(FOLDER, faulty.after_power_cut()).sessions == replay(group)
        if not faulty.hit:
            break
    assert refusals == 2  # the write and the sync


def test_a_rewrite_that_fails_leaves_no_second_file_on_a_full_disk(disk: Any, story: Any) -> None:
    faulty = disk()
    log = FileLog(FOLDER, faulty)
    log.append(story(0)[0])
    faulty.faults = {faulty.count + number: "ENOSPC" for number in (1, 3)}  # the sync, and the write of the new file
    with pytest.raises(StoreError):
        log.append(story(0)[1])
    assert faulty.log[-4:] == ["create", "write", "close", "remove"]
    assert list(faulty.names) == [FOLDER / "journal"]


def test_after_a_failed_sync_a_sync_that_succeeds_is_not_believed(disk: Any, story: Any) -> None:
    """The file that failed is never synced again: what it lost, it would lose silently."""
    groups = story(0)
    for seed in range(20):
        faulty = disk(seed=seed)
        log = FileLog(FOLDER, faulty)
        log.append(groups[0])
        faulty.faults = {faulty.count + 1: "EIO"}
        with pytest.raises(StoreError, match="injected EIO; mend the disk"):
            log.append(groups[1])
        log.append(groups[2])
        assert FileLog(FOLDER, faulty.after_power_cut()).sessions == replay(groups[0] + groups[2])


def test_an_acknowledged_append_is_not_refused_because_the_rewrite_after_it_fails(disk: Any, story: Any) -> None:
    faulty = disk()
    log = FileLog(FOLDER, faulty, compact_above=0)
    groups = story(0, length=60)
    kept: list[Record] = []
    for group in groups:
        faulty.faults = {faulty.count + 2: "dead"}  # after write and sync; a log in doubt begins with a rewrite instead
        try:
            log.append(group)
        except StoreError:
            faulty.heal()
            log.append(group)
        kept += group
        faulty.heal()
    assert FileLog(FOLDER, faulty.after_power_cut()).sessions == replay(kept)


def test_a_rewrite_that_fails_is_not_tried_again_with_every_append(disk: Any, story: Any) -> None:
    faulty = disk()
    log = FileLog(FOLDER, faulty, compact_above=100)
    began = next(record for group in story(0) for record in group)
    log.append([began])
    create = faulty.create
    attempts = 0

    def refuse(path: Path) -> Any:
        nonlocal attempts
        attempts += 1
        raise OSError(28, "full")

    faulty.create = refuse
    for _ in range(1000):
        log.append([began])
    assert 1 < attempts < 12
    faulty.create = create
    while faulty.log.count("rename") == 1:
        log.append([began])
    assert FileLog(FOLDER, faulty.after_power_cut()).sessions == replay([began])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**16),
    faults=st.dictionaries(st.integers(0, 150), st.sampled_from(KINDS), max_size=8),
    lives=st.integers(1, 3),
)
def test_the_log_keeps_its_word_through_many_failures_and_lives(
    seed: int,
    faults: dict[int, str],
    lives: int,
    disk: Callable[..., Any],
    story: Any,
    power_cut: type[BaseException],
) -> None:
    groups, faulty = story(seed), disk(faults, seed)
    witness = run(faulty, groups, power_cut)
    for life in range(lives):
        faulty = faulty.after_kill() if life % 2 else faulty.after_power_cut()
        faulty.faults = {number // 2 + faulty.count: kind for number, kind in faults.items()}
        witness.disk, witness.log = faulty, None
        try:
            witness.tell(groups)
        except power_cut:
            continue
    log = FileLog(FOLDER, faulty.after_power_cut())
    witness.check(log)
