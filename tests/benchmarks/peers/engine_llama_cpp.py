"""llama.cpp through its C interface: one batch of several sequences per call, greedy, as its own server does.

Sequences that decode side by side have KV of their own: that is quicker. In the mixed load it is unified, as in its
server: prompts of many lengths share a batch, and a shared prefix is there once.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp as llama
import numpy as np
from traffic import Wish, play

_BATCH = 512  # tokens of one call
_SLACK = 64  # tokens of a sequence beyond its context: its answer
_MIXED = 512  # tokens of a sequence of the mixed load

Rows = list[tuple[int, int, int, bool]]  # sequence, position, token, whether its logits are wanted


class Engine:
    version = f"llama-cpp-python {llama.__version__}"
    amx = True  # where the processor has it

    def __init__(self) -> None:
        self._quiet = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama.llama_backend_init()
        features = llama.llama_print_system_info().decode()
        self.version += "".join(f", {name}" for name in ("AVX512_VNNI", "AMX_INT8") if f"{name} = 1" in features)

    def load(self, model: str, threads: int, sequences: int, context: int) -> None:
        params = llama.llama_model_default_params()
        params.use_extra_bufts = self.amx  # buffers of weights that are packed for AMX; those for AVX hold no Q4_1
        self._model = llama.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {model}")
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._threads, self._sequences, self._context = threads, sequences, context
        self._contexts: dict[tuple[int, int, bool], Context] = {}
        self._open(1, context)

    def prefill(self, prompt: list[int]) -> float:
        context = self._open(1, max(len(prompt) + _SLACK, self._context))
        context.clear()
        began = time.perf_counter()
        context.read(0, prompt)
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """All sequences continue the first prompt, each with a copy of its KV."""
        prompt, count = prompts[0], len(prompts)
        context = self._open(self._sequences if count > 1 else 1, len(prompt) + _SLACK)
        context.hold(prompt[:-1])
        chosen, position = [prompt[-1]] * count, len(prompt) - 1
        for step in range(tokens + 1):
            if step == 1:  # the first step ends the prompt
                began = time.perf_counter()
            chosen = context.step([(row, position + step, token, True) for row, token in enumerate(chosen)])
        return {"tokens": tokens * count, "seconds": time.perf_counter() - began}

    def traffic(self, wishes: Sequence[Wish], bound: float) -> dict[str, Any]:
        prefixes = {wish[3]: wish[1][: wish[4]] for wish in wishes}
        context = self._open(self._sequences + len(prefixes), _MIXED, unified=True)
        context.clear()
        homes = {}
        for home, (prefix, ids) in enumerate(prefixes.items(), self._sequences):
            context.read(home, ids)
            homes[prefix] = home
        return Slots(context, self._sequences, homes, wishes).play(bound)

    def score(self, texts: list[list[int]], top: int) -> list[list[Any]]:
        context, found = self._open(1, max(map(len, texts))), []
        for text in texts:
            context.clear()
            logits = context.run([(0, position, token, True) for position, token in enumerate(text[:-1])])
            logits = logits.astype(np.float64)
            logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            found.append([_score(row, token, top) for row, token in zip(logprobs, text[1:], strict=True)])
        return found

    def _open(self, sequences: int, length: int, unified: bool = False) -> Context:
        key = (sequences, length, unified)
        if key not in self._contexts:
            self._contexts[key] = Context(self._model, self._vocab, *key, self._threads)
        return self._contexts[key]


class Context:
    """A llama_context, its batch, and what it was last told to hold."""

    def __init__(self, model: Any, vocab: int, sequences: int, length: int, unified: bool, threads: int) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * -(-length // 256) * 256, sequences
        params.kv_unified = unified
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = threads
        self._llama = llama.llama_init_from_model(model, params)
        if not self._llama:
            raise RuntimeError(f"llama.cpp made no context for {sequences} sequences of {length} tokens")
        self._memory = llama.llama_get_memory(self._llama)
        self._batch = llama.llama_batch_init(_BATCH, 0, 1)
        self._vocab, self._sequences = vocab, sequences
        self._held: list[int] | None = None

    def clear(self) -> None:
        llama.llama_memory_clear(self._memory, False)
        self._held = None

    def hold(self, ids: list[int]) -> None:
        """Every sequence holds just these tokens."""
        if self._held == ids:
            for sequence in range(self._sequences):
                llama.llama_memory_seq_rm(self._memory, sequence, len(ids), -1)
            return
        self.clear()
        self.read(0, ids)
        for sequence in range(1, self._sequences):
            self.copy(0, sequence)
        self._held = ids

    def copy(self, source: int, target: int) -> None:
        """What `target` held is gone."""
        llama.llama_memory_seq_rm(self._memory, target, -1, -1)
        llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def read(self, sequence: int, ids: list[int]) -> int:
        """Compute a prompt, in chunks; the first token of its answer."""
        for start in range(0, len(ids), _BATCH):
            chunk = enumerate(ids[start : start + _BATCH], start)
            chosen = self.step([(sequence, at, token, at == len(ids) - 1) for at, token in chunk])
        return chosen[0]

    def step(self, rows: Rows) -> list[int]:
        """One batch; the likeliest next token of each row that wants it."""
        return [int(token) for token in self.run(rows).argmax(axis=1)]

    def run(self, rows: Rows) -> Any:
        """One batch; logits [rows that want them, vocabulary], valid until the next batch."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (sequence, position, token, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, sequence, wanted
        if (code := llama.llama_decode(self._llama, batch)) != 0:
            raise RuntimeError(f"llama_decode answered {code} for {len(rows)} tokens")
        wanted_rows = sum(wanted for *_, wanted in rows)
        if not wanted_rows:
            return np.empty((0, self._vocab), np.float32)
        llama.llama_synchronize(self._llama)
        return np.ctypeslib.as_array(llama.llama_get_logits(self._llama), (wanted_rows, self._vocab))


class Slots:
    """Continuous batching: running answers first, then as much of waiting prompts as fits the batch."""

    def __init__(self, context: Context, slots: int, homes: dict[int, int], wishes: Sequence[Wish]) -> None:
        self._context, self._homes, self._wishes = context, homes, wishes
        self._free, self._waiting = list(range(slots)), list[int]()
        self._read: dict[int, int] = {}  # wish -> tokens of its prompt that are computed
        self._slots: dict[int, int] = {}
        self._answers: dict[int, list[int]] = {}

    def play(self, bound: float) -> dict[str, Any]:
        return play(self._wishes, bound, lambda index, _: self._waiting.append(index), self._step)

    def _step(self, done: Callable[[int, int], None]) -> bool:
        while self._free and self._waiting:
            index = self._waiting.pop(0)
            self._slots[index] = slot = self._free.pop()
            self._context.copy(self._homes[self._wishes[index][3]], slot)
            self._read[index], self._answers[index] = self._wishes[index][4], []
        rows: Rows = []
        ends: list[int] = []  # whose logits are wanted, in order
        for index, answer in self._answers.items():
            if answer:
                rows.append((self._slots[index], len(self._wishes[index][1]) + len(answer) - 1, answer[-1], True))
                ends.append(index)
        for index, read in self._read.items():
            prompt = self._wishes[index][1]
            if not self._answers[index] and (chunk := prompt[read : read + _BATCH - len(rows)]):
                last = len(prompt) - 1
                rows += [(self._slots[index], at, token, at == last) for at, token in enumerate(chunk, read)]
                self._read[index] = read + len(chunk)
                ends += [index] if self._read[index] == len(prompt) else []
        for index, token in zip(ends, self._context.step(rows), strict=True):
            self._answers[index].append(token)
            if len(self._answers[index]) == self._wishes[index][2]:
                done(index, len(self._answers.pop(index)))
                self._free.append(self._slots.pop(index))
                del self._read[index]
        return bool(self._answers or self._waiting)


def _score(logprobs: Any, token: int, top: int) -> Any:
    best = np.argsort(-logprobs, kind="stable")[:top]
    return [float(logprobs[token]), [(int(each), float(logprobs[each])) for each in best]]
