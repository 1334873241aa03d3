"""The journal among real processes, killed and racing, and on real disks that are full."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_os.drivers.persistence import FileLog, SlotStore
from llm_os.kernel.errors import StoreError
from llm_os.kernel.journal import Began, Done, Record, Took
from llm_os.kernel.request import Request

REQUEST = Request(model="m", prompt=[1])


def groups(first: int) -> Iterator[list[Record]]:
    """Without end: each a process that took its own number, and the end of the one eight before."""
    number = first
    while True:
        yield [Began(number, REQUEST, number, (number,)), Took(number, (number,)), *([Done(number - 8)] * (number > 8))]
        number += 1


def append_until_killed(folder: Path, first: int, acknowledged: int) -> None:
    log = FileLog(folder, compact_above=600)
    for number, group in enumerate(groups(first), first):
        log.append(group)
        os.write(acknowledged, number.to_bytes(4, "little"))


def kill_at_any_moment(folder: Path, lives: int) -> int:
    """How many groups were acknowledged, over so many lives of which each was ended by SIGKILL."""
    chance, told = random.Random(7), 0
    for _ in range(lives):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                append_until_killed(folder, told + 1, writer)
            finally:
                os._exit(1)
        os.close(writer)
        heard = os.read(reader, 4)
        for _ in range(chance.randrange(60)):
            heard += os.read(reader, 4)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(reader, 4096):  # what it said before it died
            heard += more
        os.close(reader)
        acknowledged = int.from_bytes(heard[-4:], "little")
        log = FileLog(folder)
        told = log.last_pid
        assert acknowledged <= told <= acknowledged + 1
        assert list(log.sessions) == list(range(max(1, told - 7), told + 1))
        assert all(session.since == (Took(pid, (pid,)),) for pid, session in log.sessions.items())
        log.close()
        assert {path.name for path in folder.iterdir()} <= {"journal", "journal.new"}
    return told


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_acknowledged_group_survives_kill_9_at_any_moment(tmp_path: Path, in_a_process: Any) -> None:
    assert int(in_a_process(kill_at_any_moment, tmp_path / "state", 40)) > 400


def test_a_second_kernel_is_told_who_has_the_folder_until_that_one_is_dead(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from llm_os.drivers.persistence import FileLog; "
        f"log = FileLog(Path({str(tmp_path)!r})); print('here', flush=True); input()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "here\n"
        with pytest.raises(
            StoreError, match=f"directory .* is in use by process {first.pid}; end that, or give another"
        ):
            FileLog(tmp_path)
        first.kill()
        first.wait()
    log = FileLog(tmp_path)
    with pytest.raises(StoreError, match=f"is in use by process {os.getpid()};"):
        FileLog(tmp_path)
    log.close()
    FileLog(tmp_path).close()


def fill(folder: Path) -> int:
    """Appends until the disk has no more, and goes on; how many groups were acknowledged."""
    log = FileLog(folder, compact_above=2**40)
    kept = 0
    for _ in range(400):
        with contextlib.suppress(StoreError):
            log.append([Took(1, tuple(range(1000))), Began(kept + 2, REQUEST, 0, (kept,)), Done(kept + 1)])
            kept += 1
    log.close()
    return kept


def fill_small_file(folder: Path) -> int:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    return fill(folder)


def test_a_log_on_a_full_disk_keeps_what_it_acknowledged_and_goes_on_when_there_is_room(
    tmp_path: Path, tmpfs: Any
) -> None:
    with tmpfs(tmp_path / "disk", "size=256k"):
        folder, ballast = tmp_path / "disk" / "state", tmp_path / "disk" / "ballast"
        ballast.write_bytes(bytes(64 * 1024))
        kept = fill(folder)
        assert 10 < kept < 400
        ballast.unlink()
        log = FileLog(folder)
        assert list(log.sessions) == [kept + 1]
        assert log.lost_bytes == 0
        log.append([Done(kept + 1)])
        log.close()


def test_swap_on_a_full_disk_refuses_and_keeps_nothing_of_what_it_refused(tmp_path: Path, tmpfs: Any) -> None:
    with tmpfs(tmp_path / "disk", "size=256k"):
        store = SlotStore(tmp_path / "disk")
        store.put([0], [bytes(100_000)], "disk")
        with pytest.raises(StoreError, match=r"swap to .* failed: No space left on device"):
            store.put([1, 2], [bytes(100_000), bytes(100_000)], "disk")
        store.check()
        assert (store.get(0), store.get(1), store.get(2)) == (bytes(100_000), None, None)
        store.discard([0])
        store.put([3, 4], [b"3" * 100_000, b"4" * 100_000], "disk")
        assert store.get(4) == b"4" * 100_000
        store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits of a process")
def test_a_write_that_the_system_cuts_short_is_taken_back(tmp_path: Path, in_a_process: Any) -> None:
    """The limit on the size of files: the write that crosses it is really short, and the next one fails."""
    kept = int(in_a_process(fill_small_file, tmp_path))
    assert 10 < kept < 400
    log = FileLog(tmp_path)
    assert (list(log.sessions), log.lost_bytes) == ([kept + 1], 0)
    log.close()
