"""The lock excludes threads and processes, survives its holder's death, and leaves no file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llm_os.drivers.store import lock


def test_a_held_lock_is_not_given_twice_and_its_file_goes_on_release(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with lock.held(path):
        assert lock.try_acquire(path) is None
    descriptor = lock.try_acquire(path)
    assert descriptor is not None
    lock.release(path, descriptor)
    assert list(tmp_path.iterdir()) == []


def test_the_kernel_releases_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    hold = (
        f"from llm_os.drivers.store import lock; lock.try_acquire(__import__('pathlib').Path({str(path)!r})); input(1)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.read(1)
        assert lock.try_acquire(path) is None
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock.held(path):
        pass
    assert not path.exists()


def test_only_one_of_many_threads_is_inside(tmp_path: Path) -> None:
    path, inside, most, entered = tmp_path / "x.lock", 0, 0, 0

    def work() -> None:
        nonlocal inside, most, entered
        for _ in range(5):
            with lock.held(path):
                inside += 1
                most, entered = max(most, inside), entered + 1
                os.sched_yield() if hasattr(os, "sched_yield") else None
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entered) == (1, 20)
    assert list(tmp_path.iterdir()) == []


def test_waiting_can_be_given_up(tmp_path: Path) -> None:
    def give_up() -> None:
        raise InterruptedError

    path = tmp_path / "x.lock"
    with lock.held(path), pytest.raises(InterruptedError), lock.held(path, give_up):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="the system cannot refuse links")
def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"x\.lock"):
        lock.try_acquire(tmp_path / "x.lock")
    assert not (tmp_path / "victim").exists()


def test_a_file_that_its_last_holder_removes_meanwhile_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.lock"
    lock_it = lock._lock

    def released_just_now(descriptor: int) -> bool:
        monkeypatch.setattr(lock, "_lock", lock_it)
        path.unlink()
        return lock_it(descriptor)

    monkeypatch.setattr(lock, "_lock", released_just_now)
    with lock.held(path):
        assert lock.try_acquire(path) is None
