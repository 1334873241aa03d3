"""`TorchDriver` through the contract: tokens, bytes, threads, and what happens when something fails."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llm_os.drivers.cpu import open_cpu
from llm_os.drivers.formats.changed import change_weights
from llm_os.drivers.formats.image import open_image
from llm_os.kernel.config import Config
from llm_os.kernel.driver import Batch, Move, Placement, RowError, Sample, Sequence
from llm_os.kernel.errors import Closed, DriverError, FormatError, PluginError, Unsupported

GREEDY = Sample(uniform=0.0)
REFERENCE = Path(__file__).parents[2] / "data" / "smollm2_reference.json"


def place(page_tokens=16, pages=8):
    return Placement(extents=(), page_tokens=page_tokens, pages=pages)


def one(tokens, position=0, pages=(0, 1), sample=GREEDY, pid=1):
    return Sequence(pid=pid, salt=0, tokens=tuple(tokens), position=position, pages=pages, sample=sample)


def run(driver, *sequences, model="m"):
    return driver.run(Batch(model=model, sequences=sequences)).result()


def greedy(driver, ids, count, pages):
    tokens, position, answer = tuple(ids), 0, []
    while len(answer) < count:
        (row,) = run(driver, one(tokens, position, pages))
        position += len(tokens)
        tokens = (row.token,)
        answer.append(row.token)
    return answer


def test_smollm2_answers_every_reference_case_with_the_reference_tokens(driver, smollm2: Path):
    image = open_image(smollm2)
    driver.load("m", image, place(16, 20)).result()
    image.close()
    for case in json.loads(REFERENCE.read_text())["cases"]:
        assert greedy(driver, case["ids"], len(case["greedy"]), tuple(range(20))) == case["greedy"]


def test_the_reference_cases_together_and_staggered_answer_as_alone(driver, smollm2: Path):
    image = open_image(smollm2)
    driver.load("m", image, place(16, 80)).result()
    image.close()
    cases = json.loads(REFERENCE.read_text())["cases"]
    tables = [tuple(range(i, 80, len(cases))) for i in range(len(cases))]  # interleaved: no two pages side by side
    fed, answers = [0] * len(cases), [[] for _ in cases]
    for turn in range(40):
        batch, chosen = [], []
        for i, case in enumerate(cases):
            tokens = case["ids"] + answers[i]
            if turn < 3 * i or len(answers[i]) == 32:
                continue
            piece = tokens[fed[i] : fed[i] + 4]  # the prompt goes in pieces of four
            complete = fed[i] + len(piece) == len(tokens)
            batch.append(one(piece, fed[i], tables[i], GREEDY if complete else None, pid=i))
            chosen.append(i)
            fed[i] += len(piece)
        if batch:
            for i, row in zip(chosen, run(driver, *batch), strict=True):
                if row is not None:
                    answers[i].append(row.token)
    for case, answer in zip(cases, answers, strict=True):
        assert len(answer) > 20
        assert answer == case["greedy"][: len(answer)]


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_footprint_is_what_a_load_really_holds(image, hold, precision, bits):
    driver = open_cpu(Config(precision=precision))
    image.weights = hold(image.hyperparameters, image.weights, bits)
    footprint = driver.footprint(image, 64)
    driver.load("m", image, place()).result()
    assert len(footprint.extents) == 2 + len(image.hyperparameters.layers)
    assert driver.memory().weights == sum(footprint.extents)
    assert driver.memory().kv == 0
    run(driver, one([1, 2, 3]))
    assert driver.memory().kv == 2 << 20  # one frame
    driver.unload("m").result()
    assert (driver.memory().weights, driver.memory().kv) == (0, 2 << 20)
    driver.release("m").result()
    assert (driver.memory().weights, driver.memory().kv) == (0, 0)
    driver.close()


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_workspace_has_room_for_a_matrix_as_a_pass_made_it(image, hold, precision):
    with closing(open_cpu(Config(precision=precision))) as driver:
        plain = driver.footprint(image, 64)
        image.weights = hold(image.hyperparameters, image.weights, "int8")
        held = [image.weights[name].data.nbytes for name in image.weights.names() if image.weights.kept(name)]
        assert driver.footprint(image, 64).workspace - plain.workspace >= max(held, default=0)


def test_only_rows_that_sample_answer(driver, image):
    driver.load("m", image, place()).result()
    rows = run(driver, one([1, 2], pages=(0,), sample=None), one([3], pages=(1,)), one([4], pages=(2,), sample=None))
    assert rows[0] is None
    assert rows[1] is not None
    assert rows[2] is None
    assert run(driver, one([1, 2], pages=(0,), sample=None)) == (None,)


def test_a_copied_page_continues_as_the_original(driver, image):
    driver.load("m", image, place()).result()
    prompt = [i % 100 for i in range(20)]
    run(driver, one(prompt, pages=(0, 1), sample=None))
    driver.copy("m", (Move(0, 5), Move(1, 2))).result()
    wish = Sample(uniform=0.0, logprobs=5)
    (original,) = run(driver, one([7], 20, (0, 1), wish))
    (copied,) = run(driver, one([7], 20, (5, 2), wish))
    assert copied == original


def test_a_row_of_nan_is_an_error_of_that_row_only(driver, image):
    healthy = one([1, 2, 3], pages=(0,))
    driver.load("m", image, place()).result()
    (expected,) = run(driver, healthy)
    weights = image.weights
    sick = {name: weights[name].float32().copy() for name in weights.names()}
    sick["token_embd.weight"][9] = torch.nan
    tied = image.hyperparameters.tied_embeddings
    image.weights = type(weights)(sick | ({} if tied else {"output.weight": sick["output.weight"]}))
    driver.load("sick", image, place()).result()
    rows = run(driver, one([9], pages=(1,)), healthy, model="sick")
    assert isinstance(rows[0], RowError)
    if not tied:  # a tied head spreads the damaged row of the embedding to everyone
        assert rows[1] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("bits", "least", "times"), [(None, 80_000, 6), ("int8", 100_000, 3), ("int4", 80_000, 3)])
def test_memory_returns_after_every_unload(smollm2: Path, hold, bits, least, times):
    def held() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    driver = open_cpu(Config())
    file = open_image(smollm2)
    weights = hold(file.hyperparameters, file.weights, bits)
    image = SimpleNamespace(name="m", hyperparameters=file.hyperparameters, weights=weights)
    after = []
    for _ in range(times):
        driver.load("m", image, place(16, 1000)).result()
        run(driver, one(range(40), pages=tuple(range(500, 503))))
        loaded = held()
        driver.unload("m").result()
        driver.release("m").result()
        after.append(held())
        assert loaded - after[-1] > least  # kB: the model was really there
    file.close()
    driver.close()
    assert max(after[1:]) < 1.01 * after[0]


def test_an_unknown_model_is_an_error_of_each_operation(driver):
    for operation in (
        driver.run(Batch(model="absent", sequences=())),
        driver.unload("absent"),
        driver.copy("absent", (Move(0, 1),)),
        driver.swap_out("absent", (0,)),
        driver.swap_in("absent", (), ()),
    ):
        with pytest.raises(DriverError, match=r"'absent' (is not loaded|has no KV) on the cpu device; load it first"):
            operation.result()


def test_a_load_that_fails_in_the_middle_leaves_nothing(driver, image):
    whole = image.weights
    arrays = {name: whole[name].float32() for name in whole.names() if name != "blk.1.ffn_down.weight"}

    class Damaged(type(whole)):
        def __getitem__(self, name):
            if name not in self:
                raise FormatError(f"tensor {name} is missing")
            return super().__getitem__(name)

    image.weights = Damaged(arrays)
    with pytest.raises(FormatError, match=r"blk\.1\.ffn_down"):
        driver.load("m", image, place()).result()
    assert driver.memory().weights == 0
    image.weights = whole
    driver.load("m", image, place()).result()
    assert run(driver, one([1]))[0] is not None


def test_loading_twice_is_refused_and_keeps_the_first(driver, image):
    driver.load("m", image, place()).result()
    before = run(driver, one([1, 2]))
    with pytest.raises(DriverError, match="already loaded"):
        driver.load("m", image, place()).result()
    assert run(driver, one([1, 2])) == before


@pytest.mark.parametrize(
    "sequence",
    [
        one([1] * 17, pages=(0,)),
        one([1], pages=(8,)),
        one([1], pages=(-1,)),
        one([100_000], pages=(0,)),
        one([-1], pages=(0,)),
        one([], pages=(0,)),
    ],
)
def test_what_the_kernel_must_never_ask_is_an_error_and_not_a_crash(driver, image, sequence):
    driver.load("m", image, place()).result()
    with pytest.raises(DriverError, match=r"process 1|page number"):
        run(driver, sequence)
    assert run(driver, one([1]))[0] is not None


def test_an_image_without_weights_is_unsupported(driver):
    with pytest.raises(Unsupported, match="sim-model has no weights"):
        driver.footprint(SimpleNamespace(name="sim-model"), 16)


def test_close_waits_joins_its_threads_and_may_be_called_twice(image):
    before = set(threading.enumerate())
    driver = open_cpu(Config(precision="exact"))
    loading = driver.load("m", image, place())
    running = driver.run(Batch(model="absent", sequences=()))
    assert any(thread.name.startswith("llm-os-cpu") for thread in threading.enumerate())
    driver.close()
    driver.close()
    assert loading.done()
    assert running.done()
    assert set(threading.enumerate()) == before
    assert (driver.memory().weights, driver.memory().kv) == (0, 0)
    with pytest.raises(Closed):
        driver.run(Batch(model="m", sequences=()))


def test_two_drivers_keep_their_own_thread_counts_and_give_the_old_one_back(image):
    before = torch.get_num_threads()
    one_thread = open_cpu(Config(precision="exact", threads=1))
    two_threads = open_cpu(Config(precision="exact", threads=2))
    for driver in (one_thread, two_threads):
        driver.load("m", image, place()).result()
    answers = [run(driver, one([1, 2, 3])) for driver in (one_thread, two_threads, one_thread)]
    assert answers[0] == answers[1] == answers[2]
    assert "1 threads" in one_thread.info().device
    one_thread.close()
    two_threads.close()
    assert torch.get_num_threads() == before


def test_the_tensors_of_a_device_embedding_are_shared_with_a_tied_head(architecture, weights_of):
    """The cuda driver's way of holding weights, on the CPU."""
    from llm_os.drivers.torch.decoder import Decoder
    from llm_os.drivers.torch.footprint import measure
    from llm_os.drivers.torch.linear import Format

    weights = weights_of(architecture)
    format = Format(torch.float32, 16, False, torch.device("cpu"), False)
    decoder = Decoder(architecture, weights, format)
    expected = measure(architecture, weights, format, 64, (16,))
    assert decoder.nbytes == sum(expected.extents)
    held = 4 * sum(weights[name].float32().size for name in weights.names())
    extra = 4 * len(architecture.layers) * (architecture.heads + architecture.kv_heads - 2) * architecture.head_dim
    assert decoder.nbytes == held + (extra if architecture.qk_norm else 0)


def test_reading_ahead_does_not_do_the_work_of_a_pass(driver, image):
    def never(tensor):
        raise AssertionError("changed before it was needed")

    image.weights = change_weights(image, never).weights
    driver.prefetch("m", image).result()
    with pytest.raises(PluginError, match=r"tiny: the pass failed at tensor .*changed before it was needed"):
        driver.load("m", image, place()).result()
    assert driver.memory().weights == 0
