"""The simulated disk loses what a disk may lose, and nothing else."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from llm_os.drivers.simulation.disk import PowerOff, SimFiles

PATH, OTHER, FOLDER = Path("folder/a"), Path("folder/b"), Path("folder")


def durable(disk: SimFiles, contents: bytes = b"") -> Any:
    file = disk.create(PATH)
    file.write(0, contents)
    file.sync()
    disk.sync_folder(FOLDER)
    return file


def after_crash(disk: SimFiles) -> bytes:
    disk.crash()
    file = disk.open(PATH)
    return file.read(0, file.size())


def test_what_was_written_is_read_before_it_is_synced(disk):
    file = disk.create(PATH)
    file.write(4, b"data")
    assert file.read(0, 100) == b"\0\0\0\0data" and file.size() == 8


def test_a_crash_loses_writes_that_were_not_synced(disk, faults):
    file = durable(disk, b"old!")
    file.write(0, b"new!")
    faults.plan = {"lost": "lost_sync"}
    assert after_crash(disk) == b"old!"


def test_a_crash_may_keep_writes_that_were_not_synced(disk):
    file = durable(disk, b"old!")
    file.write(0, b"new!")
    assert after_crash(disk) == b"new!"


def test_a_crash_may_tear_a_write(disk, faults, chooser):
    file = durable(disk, b"old!")
    file.write(0, b"new!")
    faults.plan = {"lost": "torn_write"}
    chooser.choose = lambda bound: 2
    assert after_crash(disk) == b"ned!"


def test_what_was_synced_survives_every_crash(disk, faults):
    file = durable(disk)
    file.write(0, b"kept")
    file.sync()
    file.write(4, b"lost")
    faults.plan = {"lost": "lost_sync"}
    assert after_crash(disk) == b"kept"
    assert after_crash(disk) == b"kept"


def test_a_sync_after_a_failed_one_does_not_make_its_writes_durable(disk, faults):
    file = durable(disk)
    file.write(0, b"one")
    faults.plan = {"sync": "io_error"}
    with pytest.raises(OSError, match="simulated"):
        file.sync()
    faults.plan = {"lost": "lost_sync"}
    file.write(3, b"two")
    file.sync()
    assert after_crash(disk) == b"\0\0\0two"


def test_a_name_is_durable_only_after_its_folder_was_synced(disk, faults):
    durable(disk, b"old")
    disk.create(OTHER).write(0, b"new")
    disk.rename(OTHER, PATH)
    assert disk.open(PATH).read(0, 9) == b"new"
    faults.plan = {"lost": "lost_sync"}
    assert after_crash(disk) == b"old"


def test_a_truncated_file_is_short_after_its_sync(disk, faults):
    file = durable(disk, b"long text")
    file.truncate(4)
    file.sync()
    faults.plan = {"lost": "lost_sync"}
    assert after_crash(disk) == b"long"


@pytest.mark.parametrize(("fault", "code"), [("io_error", errno.EIO), ("disk_full", errno.ENOSPC)])
def test_a_failed_write_leaves_the_file_as_it_was(disk, faults, fault, code):
    file = durable(disk, b"old!")
    faults.plan = {"write": fault}
    with pytest.raises(OSError, match="simulated") as failed:
        file.write(0, b"new!")
    assert failed.value.errno == code and file.read(0, 9) == b"old!"


def test_a_short_write_says_how_much_it_wrote(disk, faults, chooser):
    file = durable(disk)
    faults.plan = {"write": "short_write"}
    chooser.choose = lambda bound: 3
    assert file.write(0, b"data") == 3 and file.read(0, 9) == b"dat"


def test_a_torn_write_fails_after_a_part(disk, faults, chooser):
    file = durable(disk)
    faults.plan = {"write": "torn_write"}
    chooser.choose = lambda bound: 1
    with pytest.raises(OSError, match="simulated"):
        file.write(0, b"data")
    assert file.read(0, 9) == b"d"


def test_power_goes_off_before_the_change_that_it_is_told(disk):
    file = durable(disk)
    disk.power = 1
    file.write(0, b"one")
    with pytest.raises(PowerOff):
        file.sync()


def test_a_lock_is_held_until_it_is_given_back_or_the_program_dies(disk):
    disk.lock(PATH)
    with pytest.raises(BlockingIOError):
        disk.lock(PATH)
    disk.crash()
    disk.lock(PATH)()
    disk.lock(PATH)
