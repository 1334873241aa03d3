"""Pulling from a server that speaks the hub's protocol: well-behaved, broken, hostile and absent."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_os.drivers.store import Progress, Store
from llm_os.kernel.errors import StoreError

GGUF = b"GGUF" + os.urandom(300_000)
SHARD = os.urandom(5000)
INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
DIRECTORY = {
    "config.json": b"{}",
    "generation_config.json": b"{ }",
    "tokenizer.json": b"[1]",
    "tokenizer_config.json": b"[2]",
    "chat_template.jinja": b"{{ x }}",
    "model.safetensors.index.json": INDEX.encode(),
    "model-1-of-2.safetensors": SHARD,
    "model-2-of-2.safetensors": SHARD[::-1],
}
JUNK = {
    "README.md": b"#",
    "pytorch_model.bin": b"\x80\x04.",
    "model.pt": b"\x80\x04.",
    "modeling_x.py": b"import os",
    "consolidated.safetensors": SHARD,
    "original/config.json": b"{}",
    ".gitattributes": b"",
}


@pytest.fixture(autouse=True)
def nothing_left(leftovers: Callable[[], list[str]]) -> Iterator[None]:
    yield
    assert leftovers() == []


def fails(store: Store, model: str) -> str:
    with pytest.raises(StoreError) as caught:
        store.pull(model)
    assert "\n" not in str(caught.value)
    assert store.list() == ()
    return str(caught.value)


def files_asked(hub: Any) -> list[str]:
    return [path.rpartition("/")[2] for path, _ in hub.requests if "/resolve/" in path]


def test_a_file_is_pulled_from_the_commit_that_the_listing_names(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = {"sub/m x.gguf": GGUF, "other.gguf": b"x"}
    told: list[Progress] = []
    path = store.pull("hf:org/repo/sub/m x.gguf", progress=told.append)
    assert path.read_bytes() == GGUF
    assert path.name == "m x.gguf"
    assert hub.requests[1][0] == "/org/repo/resolve/0123456789abcdef0123456789abcdef01234567/sub/m%20x.gguf"
    assert [told[0].phase, told[-1].phase] == ["resolving", "verifying"]
    assert {progress.total_bytes for progress in told if progress.phase == "downloading"} == {len(GGUF)}
    assert store.pull("hf:org/repo/sub/m x.gguf") == path
    assert len(hub.requests) == 2


def test_a_directory_has_weights_and_their_descriptions_and_nothing_else(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = DIRECTORY | JUNK
    path = store.pull("hf:org/repo")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == DIRECTORY
    (model,) = store.list()
    assert model.bytes == sum(map(len, DIRECTORY.values()))
    lines = "".join(f"{hashlib.sha256(DIRECTORY[name]).hexdigest()}  {name}\n" for name in sorted(DIRECTORY))
    assert model.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    store.remove("hf:org/repo")
    assert not path.exists()


def test_without_an_index_one_whole_file_of_weights_is_enough(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = {"config.json": b"{}", "model.safetensors": SHARD} | JUNK
    assert {file.name for file in store.pull("hf:org/repo").iterdir()} == {"config.json", "model.safetensors"}


def test_an_alias_of_a_directory_is_checked_by_its_listing(
    store: Store, hub: Any, add_alias: Callable[..., None]
) -> None:
    hub.repos["org/repo"] = DIRECTORY
    add_alias("dir", {"source": "hf:org/repo", "sha256": "0" * 64})
    assert f"where {'0' * 64} is expected" in fails(store, "dir")
    found = store.pull("hf:org/repo").name
    add_alias("dir", {"source": "hf:org/repo", "sha256": found})
    assert store.pull("dir").name == found


def test_a_dropped_connection_is_resumed_where_it_broke(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    hub.drop_after, hub.drops_left = 100_000, 2
    assert store.pull("hf:org/repo/m.gguf").read_bytes() == GGUF
    assert [wanted for _, wanted in hub.requests] == [None, None, "bytes=100000-", "bytes=200000-"]


def test_a_server_without_ranges_is_read_again_from_the_start(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    hub.drop_after, hub.drops_left, hub.ranges = 100_000, 1, False
    assert store.pull("hf:org/repo/m.gguf").read_bytes() == GGUF


def test_a_body_that_stays_short_fails_after_a_few_tries(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    hub.drop_after = 10
    assert "hf:org/repo/m.gguf" in fails(store, "hf:org/repo/m.gguf")
    assert len(files_asked(hub)) <= 5


def test_a_body_that_claims_to_be_complete_but_is_short_fails(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    hub.body_of["m.gguf"] = GGUF[:1000]
    assert f"'m.gguf' ended after 1000 of {len(GGUF)} bytes" in fails(store, "hf:org/repo/m.gguf")


def test_a_body_longer_than_promised_fails(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    hub.body_of["m.gguf"] = GGUF + b"x"
    assert f"longer than the {len(GGUF)} bytes" in fails(store, "hf:org/repo/m.gguf")


@pytest.mark.parametrize("name", ["model-1-of-2.safetensors", "config.json"])
def test_a_wrong_hash_names_both_and_stores_nothing(store: Store, hub: Any, name: str) -> None:
    hub.repos["org/repo"] = DIRECTORY
    wrong = bytes(byte ^ 1 for byte in DIRECTORY[name])
    hub.body_of[name] = wrong
    good = DIRECTORY[name]
    if name == "config.json":
        expected, found = (hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest() for text in (good, wrong))
    else:
        expected, found = (hashlib.sha256(text).hexdigest() for text in (good, wrong))
    message = fails(store, "hf:org/repo")
    assert f"{name!r} is {found} where the hub promised {expected}" in message


def test_a_file_without_any_hash_is_not_stored(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    hub.listing = lambda listing: listing | {"siblings": [{"rfilename": "m.gguf", "size": len(GGUF)}]}
    assert "where the hub promised none" in fails(store, "hf:org/repo/m.gguf")


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "..\\x", "C:x", "a/b", "nul", "", "x\0", "x" * 300, "model.bin"],
)
def test_a_hostile_name_of_weights_writes_nothing(store: Store, hub: Any, name: str, tmp_path: Path) -> None:
    name = name if name.endswith(".bin") else f"{name}.safetensors"
    hub.repos["org/repo"] = {"config.json": b"{}", name: SHARD}
    index = json.dumps({"weight_map": {"a": name}}).encode()
    hub.repos["org/indexed"] = {"config.json": b"{}", "model.safetensors.index.json": index, name: SHARD}
    before = sorted(path for path in tmp_path.rglob("*") if "home" not in path.parts)
    fails(store, "hf:org/repo")
    fails(store, "hf:org/indexed")
    assert sorted(path for path in tmp_path.rglob("*") if "home" not in path.parts) == before


@pytest.mark.parametrize(
    "listing",
    [
        lambda _: [],
        lambda _: {},
        lambda it: it | {"sha": "main"},
        lambda it: it | {"sha": "../../../../" + "0" * 28},
        lambda it: it | {"siblings": [{"rfilename": "m.gguf"}]},
        lambda it: it | {"siblings": [{"rfilename": "m.gguf", "size": -5}]},
        lambda it: it | {"siblings": [{"rfilename": "m.gguf", "size": 2**70}]},
        lambda it: it | {"siblings": [{"rfilename": "m.gguf", "size": 2**62}]},
        lambda it: it | {"siblings": [{"rfilename": 5}]},
        lambda it: it | {"siblings": []},
        lambda it: it | {"padding": "x" * (33 << 20)},
    ],
)
def test_a_hostile_listing_is_one_clear_line(store: Store, hub: Any, listing: Callable[[Any], Any]) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    hub.listing = listing
    assert "hf:org/repo/m.gguf" in fails(store, "hf:org/repo/m.gguf")
    assert files_asked(hub) == []


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b'{"weight_map": {"a": "missing.safetensors"}}', b"[" * 100_000])
def test_a_damaged_index_is_one_clear_line(store: Store, hub: Any, index: bytes) -> None:
    hub.repos["org/repo"] = DIRECTORY | {"model.safetensors.index.json": index}
    assert "hf:org/repo" in fails(store, "hf:org/repo")


def test_pickles_are_never_pulled(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."}
    assert "pickles" in fails(store, "hf:org/repo")
    assert "only .gguf" in fails(store, "hf:org/repo/pytorch_model.bin")
    assert "pytorch_model.bin" not in files_asked(hub)


def test_a_missing_file_repository_or_config_says_so(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    assert "has no file 'n.gguf'" in fails(store, "hf:org/repo/n.gguf")
    assert "404" in fails(store, "hf:org/none/n.gguf")
    assert "config.json" in fails(store, "hf:org/repo")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_hf_token(store: Store, hub: Any, status: int) -> None:
    hub.status = status
    assert "HF_TOKEN" in fails(store, "hf:org/repo/m.gguf")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failing_hub_says_its_status(store: Store, hub: Any, status: int) -> None:
    hub.status = status
    assert f"status {status}" in fails(store, "hf:org/repo/m.gguf")


def test_the_token_is_sent_when_set(store: Store, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    store.pull("hf:org/repo/m.gguf")
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_silent_hub_is_given_up_after_the_timeout(hub: Any) -> None:
    hub.silent = True
    assert "no answer within 0.1 s" in fails(Store(read_timeout_s=0.1), "hf:org/repo/m.gguf")


def test_a_body_that_stops_coming_is_given_up_after_the_timeout(hub: Any) -> None:
    hub.repos["org/repo"] = {"m.gguf": GGUF}
    hub.pause_after = 0
    assert "no answer within 0.1 s" in fails(Store(read_timeout_s=0.1), "hf:org/repo/m.gguf")


def test_a_hub_that_refuses_connections_is_left_for_the_next_source(
    store: Store, hub: Any, add_alias: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        (tmp_path / "m.gguf").write_bytes(GGUF)
        sha256 = hashlib.sha256(GGUF).hexdigest()
        sources = ("hf:org/repo/m.gguf", f"file:{tmp_path / 'm.gguf'}")
        add_alias("m", *({"source": source, "sha256": sha256} for source in sources))
        told: list[Progress] = []
        assert store.pull("m", progress=told.append).read_bytes() == GGUF
    (note,) = [progress.note for progress in told if progress.note]
    assert "Connection refused; trying the next source" in note


def test_a_connection_that_is_not_accepted_is_given_up_after_the_timeout(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as full, socket.socket() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting.connect(full.getsockname())  # the queue is full: the next SYN gets no answer
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{full.getsockname()[1]}")
        message = fails(Store(connect_timeout_s=0.2, read_timeout_s=0.2), "hf:org/repo/m.gguf")
    assert "within 0.2 s" in message


def test_a_name_that_does_not_resolve_is_one_line(store: Store, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert "http://hub.invalid: " in fails(store, "hf:org/repo/m.gguf")


def test_a_resolver_that_does_not_answer_is_given_up_after_the_timeout(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answer.wait(30))
    try:
        message = fails(Store(connect_timeout_s=0.05), "hf:org/repo/m.gguf")
        assert not answer.is_set()
    finally:
        answer.set()
    assert "its name was not resolved within 0.05 s" in message


@pytest.mark.parametrize("endpoint", ["nonsense", "http:", "file:///etc", "http://127.0.0.1:99999", "http://[::1"])
def test_a_senseless_endpoint_is_one_line(
    store: Store, hub: Any, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert endpoint in fails(store, "hf:org/repo/m.gguf")


def test_an_html_page_in_place_of_the_listing_is_no_hub(store: Store, hub: Any) -> None:
    hub.repos["org/repo"] = {}
    hub.listing = lambda _: "<html>"
    assert "answers like no model hub" in fails(store, "hf:org/repo")
