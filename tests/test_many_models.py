"""Several real models in less memory than they need together: whatever is preempted, evicted or swapped, each answers
as if it were alone."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import llm_os
from llm_os.drivers.persistence import SlotStore
from llm_os.drivers.torch.driver import TorchDriver
from llm_os.kernel.driver import Batch

MIB = 1 << 20
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 256, 4, 4, 2, 64, 640

CASES = json.loads((Path(__file__).parent / "data" / "smollm2_reference.json").read_text())["cases"]
PROMPTS = [case["ids"] for case in CASES]


@pytest.fixture(scope="session")
def small(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A llama of 64 MB with weights of its own and SmolLM2's tokenizer, in a safetensors directory."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from llm_os.drivers.formats.gguf import GgufFile

    file = GgufFile(smollm2)
    tokens, merges, kinds = (file.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type"))
    file.close()
    folder = tmp_path_factory.mktemp("small")
    library = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges])
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    numbers = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return numbers.standard_normal((rows, columns), np.float32) * np.float32(1.5 / columns**0.5)

    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors = {"model.embed_tokens.weight": matrix(len(tokens), HIDDEN), "model.norm.weight": np.ones(HIDDEN, "f4")}
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (q, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, q),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(HIDDEN, "f4")
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="session")
def smol(smollm2: Path) -> str:
    return str(smollm2)


@pytest.fixture(scope="session")
def twin(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same file under another name: another model, as far as the kernel knows."""
    return str(shutil.copyfile(smollm2, tmp_path_factory.mktemp("twin") / "twin.gguf"))


def config(memory: int, **fields: Any) -> llm_os.Config:
    return llm_os.Config(driver="cpu", precision="exact", threads=1, memory=f"{memory}MiB", **fields)


def ask(model: str, prompt: list[int], max_tokens: int = 6, **fields: Any) -> llm_os.Request:
    sampling = llm_os.Sampling(max_tokens=max_tokens, temperature=1.0, seed=5)
    return llm_os.Request(model=model, prompt=prompt, sampling=sampling, **fields)


class Device:
    """What the driver was really asked to do, for all kernels of a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fed: Counter[str] = Counter()  # tokens, by model
        self.unloaded: Counter[str] = Counter()
        self.swapped_out: Counter[str] = Counter()  # pages, by model
        self.swapped_in: Counter[str] = Counter()
        run, unload, swap_out, swap_in = TorchDriver.run, TorchDriver.unload, TorchDriver.swap_out, TorchDriver.swap_in

        def count_run(driver: TorchDriver, batch: Batch) -> Future[Any]:
            self.fed[batch.model] += sum(len(sequence.tokens) for sequence in batch.sequences)
            return run(driver, batch)

        def count_unload(driver: TorchDriver, model: str) -> Future[None]:
            self.unloaded[model] += 1
            return unload(driver, model)

        def count_out(driver: TorchDriver, model: str, pages: tuple[int, ...]) -> Future[tuple[bytes, ...]]:
            self.swapped_out[model] += len(pages)
            return swap_out(driver, model, pages)

        def count_in(
            driver: TorchDriver, model: str, pages: tuple[int, ...], contents: tuple[bytes, ...]
        ) -> Future[None]:
            self.swapped_in[model] += len(pages)
            return swap_in(driver, model, pages, contents)

        monkeypatch.setattr(TorchDriver, "run", count_run)
        monkeypatch.setattr(TorchDriver, "unload", count_unload)
        monkeypatch.setattr(TorchDriver, "swap_out", count_out)
        monkeypatch.setattr(TorchDriver, "swap_in", count_in)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def own_bytes() -> int:
    """Physical memory that is this process's own; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) * 1024


class Watch:
    """Looks at a kernel's memory all the time, from a thread of its own. `with Watch(kernel) as watch: ...`"""

    def __init__(self, kernel: llm_os.Kernel, before: int) -> None:
        """`before` is what the process had before the kernel was there."""
        self.host = self.disk = self.driver = self.resident = self.samples = 0  # the most that was seen, in bytes
        self._kernel, self._before = kernel, before
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._done.wait(0.003):
            info = self._kernel.memory()
            self.host, self.disk = max(self.host, info.host), max(self.disk, info.disk)
            self.driver = max(self.driver, info.driver)
            self.resident = max(self.resident, own_bytes() - self._before)
            self.samples += 1

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()


Alone = Callable[..., tuple[int, ...]]


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    """alone(model, prompt, max_tokens): what it answers when nobody else is there; each is computed once."""
    known: dict[tuple[str, tuple[int, ...], int], tuple[int, ...]] = {}
    with llm_os.Kernel(config(2048)) as kernel:

        def answer(model: str, prompt: list[int], max_tokens: int = 6) -> tuple[int, ...]:
            key = (model, tuple(prompt), max_tokens)
            if key not in known:
                known[key] = kernel.stream(ask(model, prompt, max_tokens)).result().token_ids
            return known[key]

        yield answer


# 656 MiB are SmolLM2's weights and workspace, 210 the small model's; a frame of 2 MiB is 45 tokens of SmolLM2's KV
TIGHT = {
    "nothing to swap to": config(660),
    "swap to disk": config(660, swap_disk="64MiB"),
}


@pytest.mark.parametrize("machine", TIGHT.values(), ids=TIGHT.keys())
def test_chats_that_preempt_and_evict_each_other_answer_as_each_alone(
    smol: str, small: str, alone: Alone, device: Device, machine: llm_os.Config
) -> None:
    chats = [(smol, PROMPTS[0]), (small, PROMPTS[1]), (small, PROMPTS[2])]
    slow, quick, late = [alone(model, prompt, count) for (model, prompt), count in zip(chats, (20, 6, 12), strict=True)]
    turns = [(smol, [*PROMPTS[0], *slow, *PROMPTS[3]]), (small, [*PROMPTS[1], *quick, *PROMPTS[3]])]
    expected = [alone(model, prompt) for model, prompt in turns]
    device.unloaded.clear()
    before = own_bytes()
    with llm_os.Kernel(machine) as kernel, Watch(kernel, before) as watch:
        first = kernel.stream(ask(*chats[0], max_tokens=20, nice=5))
        said = next(first).token_ids
        assert kernel.stream(ask(*chats[1], nice=-5)).result().token_ids == quick
        [evicted] = kernel.ps()
        assert evicted.state == "loading" and 0 < evicted.completion_tokens < 20  # in the middle of its answer
        last = kernel.stream(ask(*chats[2], max_tokens=12, nice=19))
        while len(said) <= evicted.completion_tokens:
            said += next(first).token_ids
        assert device.unloaded == {smol: 1, small: 1}
        kernel.nice(last.pid, -20)
        assert last.result().token_ids == late
        assert device.unloaded[smol] == 2
        assert said + first.result().token_ids[len(said) :] == slow
        streams = [kernel.stream(ask(*turn)) for turn in turns]
        answers = [stream.result() for stream in streams]
        assert [answer.token_ids for answer in answers] == expected
        assert kernel.ps() == [] and kernel.memory().kv == 0
    assert bool(watch.host) == bool(machine.swap_host) and bool(watch.disk) == bool(machine.swap_disk)
    assert bool(device.swapped_in[smol]) == bool(watch.host or watch.disk)
    check_memory(watch, machine)


def check_memory(watch: Watch, machine: llm_os.Config) -> None:
    """What was really there stayed within the budget. The process as a whole has more: what is swapped to memory, the
    vocabularies of three open images, and what libraries keep for themselves."""
    budget = machine.budget(0)
    assert watch.samples and 0 < watch.driver <= budget
    assert watch.resident <= budget + watch.host + 96 * MIB


LONG = [(7919 * index) % 40_000 + 100 for index in range(1994)]


def test_a_chat_of_2000_tokens_outlives_the_eviction_of_its_model_and_swap(
    smol: str, twin: str, small: str, device: Device
) -> None:
    """Of the two large models the budget holds one, with the KV of the chat, and a small one without it."""
    machine = config(656 + 216, swap_host="128MiB")
    before = own_bytes()
    with llm_os.Kernel(machine) as kernel, Watch(kernel, before) as watch:

        def turn(prompt: list[int]) -> llm_os.Completion:
            device.fed.clear()
            device.swapped_in.clear()
            return kernel.stream(ask(smol, prompt)).result()

        first = turn(LONG)
        assert (first.usage.cached_tokens, device.fed[smol]) == (0, 1994 + 5)

        anyio.run(kernel.load, twin)
        assert device.unloaded == {smol: 1} and not device.swapped_out
        prompt = [*LONG, *first.token_ids, *PROMPTS[0]]
        second = turn(prompt)
        assert (second.usage.cached_tokens, device.fed[smol]) == (1999, 1 + len(PROMPTS[0]) + 5)
        computed = len(prompt) + 5

        anyio.run(kernel.load, small)  # in the place of most of the KV
        anyio.run(kernel.load, twin)  # in the place of the weights
        assert device.unloaded[smol] == 2 and device.swapped_out[smol] > 100
        prompt = [*prompt, *second.token_ids, *PROMPTS[1]]
        third = turn(prompt)
        assert (third.usage.cached_tokens, device.fed[smol]) == (computed, 1 + len(PROMPTS[1]) + 5)
        assert device.swapped_in == device.swapped_out

        anyio.run(kernel.unload, smol)  # and now as if nothing of it had been kept
        again = turn(prompt)
        assert (again.usage.cached_tokens, device.fed[smol]) == (0, len(prompt) + 5)
        assert again.token_ids == third.token_ids
        assert turn(prompt[: computed - 5]).token_ids == second.token_ids
    check_memory(watch, machine)


def first_slot(store: SlotStore) -> int:
    return min(store._slots)


def damage(store: SlotStore, slot: int) -> None:
    """Turn over one bit of what is kept there, in memory or on disk."""
    digest, place = store._slots[slot]
    if isinstance(place, bytes):
        store._slots[slot] = type(store._slots[slot])(digest, bytes([place[0] ^ 1]) + place[1:])
    else:
        assert store._file is not None
        store._file.write(place.offset, bytes([store._file.read(place.offset, 1)[0] ^ 1]))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Callable[[], SlotStore]:
    """The swap store that a kernel of this test has used last."""
    used: list[SlotStore] = []
    put = SlotStore.put

    def remember(store: SlotStore, *arguments: Any) -> None:
        used.append(store)
        put(store, *arguments)

    monkeypatch.setattr(SlotStore, "put", remember)
    return lambda: used[-1]


@pytest.mark.parametrize(
    ("memory", "swap", "damaged"),
    [
        (680, {}, False),
        (660, {}, False),
        (660, {"swap_host": "64MiB"}, True),
        (660, {"swap_disk": "64MiB"}, False),
        (660, {"swap_disk": "64MiB", "swap_sealed": True}, True),
    ],
    ids=["stays", "dropped", "damaged in memory", "disk", "damaged on disk"],
)
def test_a_chat_that_waits_for_a_tool_while_others_take_its_memory_goes_on_as_if_it_had_not(
    smol: str,
    small: str,
    alone: Alone,
    device: Device,
    store: Callable[[], SlotStore],
    memory: int,
    swap: dict[str, Any],
    damaged: bool,
) -> None:
    with llm_os.Kernel(config(memory, **swap)) as kernel:
        stream = kernel.stream(ask(small, LONG, max_tokens=2000))
        said = list(next(stream).token_ids)
        anyio.run(kernel.block, stream.pid)
        [blocked] = kernel.ps()
        kept = blocked.computed_tokens
        kernel.stream(ask(smol, PROMPTS[0], max_tokens=1)).result()
        assert device.unloaded[small] == 1
        swapped = bool(device.swapped_out[small])
        assert swapped == bool(swap)
        if damaged:
            damage(store(), first_slot(store()))
        device.fed.clear()
        anyio.run(kernel.unblock, stream.pid, PROMPTS[1])
        while len(said) < blocked.completion_tokens + 6:
            said += next(stream).token_ids
        fed, [info] = device.fed[small], kernel.ps()
    recomputed = 0 if (swap or memory == 680) and not damaged else kept
    assert info.computed_tokens - kept + recomputed - 1 <= fed <= info.computed_tokens - kept + recomputed + 1
    before = said[: blocked.completion_tokens]
    assert tuple(before) == alone(small, LONG, len(before))
    assert tuple(said[len(before) :][:6]) == alone(small, [*LONG, *before, *PROMPTS[1]], 6)
