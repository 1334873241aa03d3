"""Frames are one memory: what KV really takes, when it goes, and what does not wait for what."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_os.drivers.cpu import open_cpu
from llm_os.drivers.formats.image import open_image
from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, Extent, Move, Placement, Sample, Sequence
from llm_os.kernel.errors import Closed, DriverError

FRAME = 2 << 20
WISH = Sample(uniform=0.0, logprobs=5)
linux = pytest.mark.skipif(sys.platform != "linux", reason="commits memory by writing on Linux only")


def place(*extents, page_tokens=16, pages=4096):
    return Placement(extents=extents, page_tokens=page_tokens, pages=pages)


def run(driver, tokens, position, pages, model="m"):
    sequence = Sequence(pid=1, salt=0, tokens=tuple(tokens), position=position, pages=pages, sample=WISH)
    return driver.run(Batch(model=model, sequences=(sequence,))).result(60)[0]


def slots(driver, image, page_tokens=16):
    """Pages of a frame."""
    return FRAME // (page_tokens * driver.footprint(image, 16).kv_bytes_per_token)


def anonymous():
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def content(driver, chance, image, page_tokens=16):
    return chance.randbytes(page_tokens * driver.footprint(image, 16).kv_bytes_per_token)


@linux
def test_frames_that_pass_between_models_are_held_once(driver, image):
    per_frame = slots(driver, image)
    pages = tuple(range(per_frame, 5 * per_frame))
    chance = random.Random(0)
    contents = tuple(content(driver, chance, image) for _ in pages)
    for model in ("a", "b"):
        driver.load(model, image, place()).result()
    held = []
    for model in ("a", "b", "a"):
        driver.swap_in(model, pages, contents).result()
        held.append((driver.memory().kv, anonymous()))
    assert [kv for kv, _ in held] == [4 * FRAME] * 3
    assert held[2][1] - held[0][1] < FRAME


@linux
def test_weights_take_the_memory_of_the_pages_that_lay_in_their_frames(driver, image):
    per_frame = slots(driver, image)
    pages = tuple(range(10 * per_frame))
    chance = random.Random(0)
    contents = tuple(content(driver, chance, image) for _ in pages)
    driver.load("a", image, place()).result()
    driver.swap_in("a", pages, contents).result()
    before = anonymous()
    driver.load("b", image, place(Extent(0, 2), Extent(4, 3), Extent(9, 50))).result()
    assert driver.memory().kv == 4 * FRAME
    assert before - anonymous() > 4 * FRAME  # six frames less, and small weights more
    for frame in (2, 3, 7, 8):
        kept = pages[frame * per_frame : (frame + 1) * per_frame]
        assert driver.swap_out("a", kept).result() == contents[kept[0] : kept[-1] + 1]
    driver.load("c", image, place(Extent(0, 1000))).result()
    assert driver.memory().kv == 0


@linux
def test_what_the_driver_says_of_kv_is_what_the_system_gave(driver, image):
    chance = random.Random(1)
    pages = tuple(chance.sample(range(4096), 200))
    contents = (content(driver, chance, image),) * len(pages)
    driver.load("m", image, place()).result()
    start = anonymous()
    driver.swap_in("m", pages, contents).result()
    written = sum(map(len, contents))
    assert written <= anonymous() - start + FRAME // 4
    assert anonymous() - start <= driver.memory().kv + FRAME // 4
    frames = {page // slots(driver, image) for page in pages}
    assert driver.memory().kv == len(frames) * FRAME


def test_a_page_whose_frame_passed_on_is_never_swapped_out_as_if_it_were_there(driver, image):
    for model in ("a", "b"):
        driver.load(model, image, place()).result()
    far = slots(driver, image)
    run(driver, [1, 2, 3], 0, (0,), "a")
    run(driver, [1, 2, 3], 0, (far,), "a")
    run(driver, [4, 5, 6], 0, (1,), "b")
    with pytest.raises(DriverError, match="model 'a' has no KV in some of the pages"):
        driver.swap_out("a", (0, far)).result()
    assert len(driver.swap_out("a", (far,)).result()) == 1
    driver.load("c", image, place(Extent(0, 2))).result()
    with pytest.raises(DriverError, match="model 'a' has no KV in some of the pages"):
        driver.swap_out("a", (far,)).result()


def test_swapped_pages_come_back_bit_for_bit(driver, image):
    chance = random.Random(2)
    driver.load("m", image, place()).result()
    pages = tuple(chance.sample(range(4096), 20))
    contents = tuple(content(driver, chance, image) for _ in pages)  # NaN of every kind among them
    driver.swap_in("m", pages, contents).result()
    assert driver.swap_out("m", pages).result() == contents
    moves = tuple(Move(page, page ^ 1) for page in pages if page ^ 1 not in pages)
    driver.copy("m", moves).result()
    assert driver.swap_out("m", tuple(move.target for move in moves)).result() == tuple(
        contents[pages.index(move.source)] for move in moves
    )
    assert driver.swap_out("m", pages).result() == contents


def test_kept_kv_is_refused_to_a_model_of_another_shape(driver, image):
    driver.load("m", image, place()).result()
    run(driver, [1, 2, 3], 0, (0,))
    driver.unload("m").result()
    for other in (place(page_tokens=8), place(pages=4095)):
        with pytest.raises(DriverError, match=r"model 'm' kept KV of 4096 pages of 16 tokens, .*; release it before"):
            driver.load("m", image, other).result()
    assert driver.memory().weights == 0
    before = driver.swap_out("m", (0,)).result()
    driver.load("m", image, place()).result()
    assert driver.swap_out("m", (0,)).result() == before
    driver.unload("m").result()
    driver.release("m").result()
    driver.load("m", image, place(page_tokens=8)).result()


def test_a_load_that_fails_leaves_kept_kv_and_makes_no_other(driver, image):
    broken = SimpleNamespace(name="broken", hyperparameters=image.hyperparameters, weights=type(image.weights)({}))
    driver.load("m", image, place()).result()
    expected = run(driver, [1, 2, 3], 0, (0,))
    driver.unload("m").result()
    for model in ("m", "other"):
        with pytest.raises(KeyError):
            driver.load(model, broken, place()).result()
    with pytest.raises(DriverError, match="'other' has no KV on"):
        driver.swap_out("other", (0,)).result()
    driver.load("m", image, place()).result()
    assert run(driver, [3], 2, (0,)) == expected


def test_a_page_larger_than_a_frame_is_refused(image):
    driver = open_cpu(Config(precision="exact", frame_size=4096))
    with pytest.raises(DriverError, match="more than a frame of 4096; raise frame_size"):
        driver.load("m", image, place()).result()
    driver.close()


class Gate:
    """Weights whose reading waits, once begun, until it is opened."""

    def __init__(self, weights):
        self._weights = weights
        self.begun, self.opened = threading.Event(), threading.Event()

    def __contains__(self, name):
        return name in self._weights

    def __getitem__(self, name):
        self.begun.set()
        assert self.opened.wait(60)
        return self._weights[name]

    def names(self):
        return self._weights.names()

    def kept(self, name):
        return None


@pytest.fixture
def slow(image):
    gate = Gate(image.weights)
    yield SimpleNamespace(name="slow", hyperparameters=image.hyperparameters, weights=gate, gate=gate)
    gate.opened.set()


@pytest.mark.parametrize("operation", ["load", "prefetch"])
def test_nothing_waits_for_the_files_of_another_model(driver, image, slow, operation):
    driver.load("m", image, place()).result()
    driver.load("idle", image, place()).result()
    run(driver, [1, 2, 3], 0, (0,))
    waiting = driver.load("slow", slow, place()) if operation == "load" else driver.prefetch("slow", slow)
    assert slow.gate.begun.wait(60)
    contents = driver.swap_out("m", (0,)).result(60)
    driver.swap_in("m", (5,), contents).result(60)
    driver.copy("m", (Move(5, 6),)).result(60)
    assert run(driver, [3], 2, (6,)) == run(driver, [3], 2, (0,))
    driver.unload("idle").result(60)
    driver.release("idle").result(60)
    if operation == "prefetch":
        driver.load("idle", image, place()).result(60)
    else:
        driver.prefetch("idle", image).result(60)
    assert not waiting.done()
    slow.gate.opened.set()
    waiting.result(60)


def test_close_in_the_middle_of_everything_gives_everything_back(image, slow):
    threads = set(threading.enumerate())
    driver = open_cpu(Config(precision="exact"))
    driver.load("m", image, place()).result()
    driver.load("kept", image, place()).result()
    run(driver, [1, 2, 3], 0, (0,))
    run(driver, [1, 2, 3], 0, (4000,), "kept")
    driver.unload("kept").result()
    flying = [driver.load("slow", slow, place()), driver.prefetch("slow", slow)]
    assert slow.gate.begun.wait(60)
    flying += [driver.swap_out("m", (0,)), driver.release("kept")]
    closing = threading.Thread(target=driver.close)
    closing.start()
    slow.gate.opened.set()
    closing.join(60)
    assert all(future.done() for future in flying)
    assert isinstance(flying[1].exception(), Closed | None)
    assert (driver.memory().weights, driver.memory().kv) == (0, 0)
    assert set(threading.enumerate()) == threads
    with pytest.raises(Closed):
        driver.prefetch("m", image)


@linux
def test_prefetch_brings_the_file_into_the_cache_and_takes_no_memory(driver, smollm2: Path, tmp_path: Path):
    copy = tmp_path / "model.gguf"
    copy.write_bytes(smollm2.read_bytes())
    image = open_image(copy)
    mapped = resident(copy)
    before = anonymous()
    driver.prefetch("m", image).result()
    assert resident(copy) - mapped > 0.9 * copy.stat().st_size
    assert anonymous() - before < 8 << 20
    assert (driver.memory().weights, driver.memory().kv) == (0, 0)
    image.close()


def resident(path):
    """Bytes of the file that this process has mapped and that are in memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    size, ours = 0, False
    for line in lines:
        first = line.split()[0]
        if not first.endswith(":"):
            ours = line.endswith(str(path))
        elif ours and first == "Rss:":
            size += 1024 * int(line.split()[1])
    return size
