"""Swapped pages come back as they were or not at all, whatever the disk does."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm_os.drivers.persistence import AesGcm, SlotStore
from llm_os.kernel.errors import ConfigError, StoreError
from llm_os.kernel.events import Tier

FOLDER = Path("/state")
CIPHERS = pytest.mark.parametrize("cipher", [lambda: None, AesGcm], ids=["plain", "sealed"])


def page(number: int, size: int = 5000) -> bytes:
    return random.Random(number).randbytes(size)


@CIPHERS
def test_pages_come_back_from_either_tier_until_they_are_discarded(tmp_path: Path, cipher: Callable[[], Any]) -> None:
    store = SlotStore(tmp_path / "state", cipher())
    store.put([1, 2], [page(1), page(2, 1)], "host")
    store.put([3, 4], [page(3), b""], "disk")
    store.demote([1, 3])
    assert [store.get(slot) for slot in (1, 2, 3, 4)] == [page(1), page(2, 1), page(3), b""]
    store.check()
    store.discard([1, 4, 77])
    assert [store.get(slot) for slot in (1, 2, 3, 4)] == [None, page(2, 1), page(3), None]
    store.close()
    store.close()
    assert store.get(2) is None
    tiers: tuple[Tier, ...] = ("host", "disk")
    for tier in tiers:
        with pytest.raises(StoreError, match=r"closed|no swap on disk"):
            store.put([9], [b"x"], tier)


def test_without_a_folder_there_is_host_memory_only() -> None:
    store = SlotStore(None)
    store.put([1], [page(1)], "host")
    with pytest.raises(StoreError, match="there is no swap on disk; set the directory for state"):
        store.put([2], [page(2)], "disk")
    with pytest.raises(StoreError, match="there is no swap on disk"):
        store.demote([1])
    assert (store.get(1), store.get(2)) == (page(1), None)


def test_a_slot_is_not_given_twice_and_one_that_is_not_there_is_not_demoted(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    store.put([1], [page(1)], "host")
    with pytest.raises(StoreError, match="swap slot 1 is in use already"):
        store.put([2, 1], [page(2), page(3)], "disk")
    with pytest.raises(StoreError, match="swap slot 5 is not there"):
        store.demote([1, 5])
    store.check()
    assert (store.get(1), store.get(2)) == (page(1), None)
    store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="open files keep their names there")
def test_the_file_has_no_name_so_that_nothing_is_left_by_kill_9(tmp_path: Path) -> None:
    (tmp_path / "swap").write_text("of a system where it had one")
    store = SlotStore(tmp_path)
    store.put([1], [page(1)], "disk")
    assert list(tmp_path.iterdir()) == []
    store.close()


def test_a_system_that_keeps_the_names_of_open_files_is_cleaned_up_at_close(disk: Any) -> None:
    faulty = disk({2: "EIO"})  # make_folder, create, remove
    store = SlotStore(FOLDER, files=faulty)
    store.put([1], [page(1)], "disk")
    assert list(faulty.names) == [FOLDER / "swap"] and store.get(1) == page(1)
    store.close()
    assert faulty.names == {}


class Platter:
    """A disk's files, with the swap file's inode kept where a test can reach it."""

    def __init__(self, disk: Any) -> None:
        self.disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self.disk, name)

    def create(self, path: Path) -> Any:
        handle = self.disk.create(path)
        self.data = handle.inode.data
        return handle


@CIPHERS
@pytest.mark.parametrize("where", [0, 2500, 4999])
def test_contents_that_changed_on_the_disk_are_never_served(disk: Any, where: int, cipher: Callable[[], Any]) -> None:
    platter = Platter(disk())
    store = SlotStore(FOLDER, cipher(), platter)
    store.put([1, 2], [page(1), page(2)], "disk")
    platter.data[where] ^= 1
    assert (store.get(1), store.get(2)) == (None, page(2))
    platter.data[where] ^= 1
    assert store.get(1) == page(1)
    del platter.data[8192 + 100 :]
    assert (store.get(1), store.get(2)) == (page(1), None)


@CIPHERS
def test_a_page_of_another_slot_is_never_served_even_if_it_is_whole(disk: Any, cipher: Callable[[], Any]) -> None:
    platter = Platter(disk())
    store = SlotStore(FOLDER, cipher(), platter)
    store.put([1, 2, 3], [page(1), page(2), page(3)], "disk")
    first, second = platter.data[:8192], platter.data[8192:16384]
    platter.data[:16384] = second + first
    assert [store.get(slot) for slot in (1, 2, 3)] == [None, None, page(3)]


def test_contents_that_changed_in_host_memory_are_never_served() -> None:
    store, memory = SlotStore(None), bytearray(page(1))
    store.put([1], [memory], "host")  # type: ignore[list-item]
    assert store.get(1) == page(1)
    memory[100] ^= 4
    assert store.get(1) is None


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "short", "late", "dead"])
@CIPHERS
def test_whatever_operation_fails_pages_are_whole_or_refused_and_no_cell_is_lost(
    kind: str, cipher: Callable[[], Any], disk: Any
) -> None:
    def refused(call: Callable[[], None]) -> bool:
        try:
            call()
        except StoreError as error:
            assert "\n" not in str(error) and "mend the disk" in str(error)
            return True
        return False

    for number in range(1000):
        faulty = disk({number: kind})
        try:
            store = SlotStore(FOLDER, cipher(), faulty)
        except StoreError:
            assert faulty.hit
            continue
        there: set[int] = set()
        for first in range(0, 20, 4):
            slots = list(range(first, first + 4))
            tier: Tier = "disk" if first % 8 else "host"
            if not refused(partial(store.put, slots, [page(n, 3000 + n) for n in slots], tier)):
                there |= {*slots}
            store.check()
            if first in there and not refused(partial(store.demote, slots)):
                store.discard([first, first + 2])
                there -= {first, first + 2}
            store.check()
        got = {slot: store.get(slot) for slot in range(20)}
        assert all(content in (None, page(slot, 3000 + slot)) for slot, content in got.items())
        lost = {slot for slot in there if got[slot] is None}
        assert len(lost) <= faulty.hit * (20 if kind == "dead" else 1)
        assert all(got[slot] is None for slot in range(20) if slot not in there)
        faulty.heal()
        assert all(store.get(slot) == page(slot, 3000 + slot) for slot in there), "a read that failed lost the page"
        store.discard(list(range(20)))
        store.check()
        store.put([100], [page(100)], "disk")
        assert store.get(100) == page(100)
        store.close()
        if not faulty.hit:
            break
    else:
        pytest.fail("no run without a fault")


def test_the_file_shrinks_when_most_of_it_is_free(disk: Any) -> None:
    platter = Platter(disk())
    store = SlotStore(FOLDER, files=platter)
    store.put(list(range(64)), [page(n) for n in range(64)], "disk")
    store.discard(list(range(10, 64)))
    assert len(platter.data) == 10 * 8192
    assert all(store.get(n) == page(n) for n in range(10))


def test_another_models_pages_fit_where_the_first_ones_were(disk: Any) -> None:
    platter = Platter(disk())
    store = SlotStore(FOLDER, files=platter)
    for round_, size in enumerate((4096, 40960, 8192, 4096)):
        slots = list(range(1000 * round_, 1000 * round_ + 409600 // size))
        store.put(slots, [page(slot, size) for slot in slots], "disk")
        assert len(platter.data) <= 409600
        assert all(store.get(slot) == page(slot, size) for slot in slots)
        store.discard(slots)


@CIPHERS
def test_two_threads_and_more_use_the_store_at_once(tmp_path: Path, cipher: Callable[[], Any]) -> None:
    store, barrier = SlotStore(tmp_path, cipher()), threading.Barrier(4)
    tiers: tuple[Tier, ...] = ("host", "disk")

    def work(thread: int) -> int:
        chance, mine, good = random.Random(thread), dict[int, bytes](), 0
        barrier.wait()
        for number in range(60):
            slots = [10_000 * thread + 10 * number + i for i in range(3)]
            contents = [page(slot, chance.randrange(1, 9000)) for slot in slots]
            store.put(slots, contents, tiers[chance.randrange(2)])
            mine.update(zip(slots, contents, strict=True))
            store.demote(chance.sample(sorted(mine), 2))
            for slot in chance.sample(sorted(mine), min(4, len(mine))):
                assert store.get(slot) == mine[slot]
                good += 1
            for slot in chance.sample(sorted(mine), min(2, len(mine) - 1)):
                del mine[slot]
                store.discard([slot])
        store.discard(list(mine))
        return good

    with ThreadPoolExecutor(4) as threads:
        assert all(good > 200 for good in threads.map(work, range(4)))
    store.check()
    store.close()


def test_a_slot_that_is_discarded_while_it_is_demoted_leaves_no_cell(disk: Any) -> None:
    faulty = disk()
    store = SlotStore(FOLDER, files=faulty)
    store.put([1], [page(1)], "host")
    settle = faulty.settle

    def discard(fault: str | None) -> None:
        settle(fault)
        store.discard([1])

    faulty.settle = discard
    store.demote([1])
    store.check()
    assert store.get(1) is None


def test_nothing_readable_lies_on_the_disk_of_a_sealed_store(disk: Any) -> None:
    for cipher, readable in ((None, True), (AesGcm(), False)):
        platter = Platter(disk())
        store = SlotStore(FOLDER, cipher, platter)
        store.put([1, 2], [b"my secret" * 100, b"my secret" * 100], "disk")
        assert (b"secret" in platter.data) == readable
        assert store.get(2) == b"my secret" * 100


def test_what_one_boot_sealed_no_other_opens_and_no_slot_but_its_own() -> None:
    cipher, other = AesGcm(), AesGcm()
    sealed = cipher.seal(7, b"contents")
    assert cipher.open(7, sealed) == b"contents" and cipher.seal(7, b"contents") != sealed
    for opener, slot, data in ((other, 7, sealed), (cipher, 8, sealed), (cipher, 7, sealed[:-1]), (cipher, 7, b"")):
        with pytest.raises(ValueError, match=f"what lies in slot {slot} is not what was sealed there"):
            opener.open(slot, data)


def test_without_the_package_the_cipher_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(ConfigError, match=r"needs the package cryptography; pip install 'llm-os-runtime\[cipher\]'"):
        AesGcm()
