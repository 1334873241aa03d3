"""Operations of native code, each run by itself; stored weights with random contents; processors to run on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from llvmlite import binding

from llm_os.drivers.formats.quants import KINDS
from llm_os.drivers.formats.weights import WeightTensor
from llm_os.drivers.native import kernels
from llm_os.drivers.native.kernels import Kernels, Sizes
from llm_os.drivers.native.matrix import ROWS
from llm_os.drivers.native.packed import PackedMatrix
from llm_os.drivers.native.processor import Processor, can_compile
from llm_os.drivers.native.program import Program
from llm_os.drivers.native.threads import Team

if not can_compile():
    collect_ignore_glob = ["test_*.py"]

PLAIN: dict[str, Any] = {
    "head_dim": 64,
    "group": 3,
    "rope_dims": (64,),
    "qk_norm": False,
    "activation": "silu",
    "kinds": ("Q4", "Q4F", "Q8"),
}
WAYS = {  # of multiplying bytes: LLVM's names of processors that do so, and what this one must have to run their code
    "this": (None, ()),
    "vnni": ("cascadelake", ("avx512vnni",)),
    "avxvnni": ("alderlake", ("avxvnni", "gfni", "vaes")),
    "pairs": ("haswell", ("avx2", "bmi2")),
}


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_in_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder, home = tmp_path_factory.mktemp("compiled"), kernels.home
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "home", lambda kind: home(kind) if "LLM_OS_HOME" in os.environ else folder)
        yield


class Integers:
    """Room for rounded rows, as `groups` has them."""

    def __init__(self, rows: int, groups: int) -> None:
        tiles = -(-rows // 16)
        self._rows = rows
        self._codes = np.full((tiles, groups, 16, 32), 99, np.int8)
        self._terms = np.full((tiles, groups, 16, 3), 99, np.float32)
        self.places = address(self._codes), address(self._terms)

    @property
    def codes(self) -> np.ndarray:
        """[rows, groups, 32]"""
        return self._by_rows(self._codes)

    @property
    def terms(self) -> np.ndarray:
        """[rows, groups, 3]: s, s times the sum of the codes, o."""
        return self._by_rows(self._terms)

    @property
    def values(self) -> np.ndarray:
        """What they stand for, [rows, columns], in float64."""
        s, _, o = self.terms.astype(np.float64).transpose(2, 0, 1)
        return (self.codes * s[..., None] + o[..., None]).reshape(self._rows, -1)

    def _by_rows(self, tiles: np.ndarray) -> np.ndarray:
        whole = tiles.transpose(0, 2, 1, 3).reshape(-1, *tiles.shape[1::2])
        return np.ascontiguousarray(whole[: self._rows])


class Workbench:
    """The operations of one set of sizes, compiled for one processor."""

    def __init__(self, way: str, sizes: dict[str, Any]) -> None:
        self.kernels = Kernels(Sizes(**sizes), Processor(WAYS[way][0]))

    def run(self, *operations: list[int], rows: int = 1, state: tuple[int, ...] = (), threads: int = 1) -> None:
        """Perform `operations`, each [code or name, items, rows of an item, fields ...], for `rows` rows; `state` is
        what follows the number of rows."""
        now = np.zeros(8, np.int64)
        now[: len(state) + 1] = (rows, *state)
        program = Program([[self.kernels.codes[name], *fields] for name, *fields in operations], now, threads)
        record = np.array([program.record], np.int64)
        _team(threads).run(self.kernels.run, record.ctypes.data, 1, threads)

    def rounded(self, x: np.ndarray) -> Integers:
        """Rows of float32 as integers."""
        x = np.ascontiguousarray(x, np.float32)
        found = Integers(len(x), x.shape[1] // 32)
        self.run(["rounding", 1, 1, *found.places, address(x), 0, x.shape[1] // 32], rows=len(x))
        return found

    def product(
        self,
        matrix: PackedMatrix,
        x: np.ndarray,
        *,
        threads: int = 1,
        chunk: int = 2,
        add: np.ndarray | None = None,
        bias: np.ndarray | None = None,
    ) -> np.ndarray:
        """[rows, the matrix's rows filled up to 16], in items of `chunk` blocks."""
        integers = self.rounded(x)
        width = 16 * sum(blocks for _, _, blocks in matrix.parts)
        out = np.full((len(x), width), np.nan, np.float32) if add is None else add.copy()
        start = np.zeros(width, np.float32) if bias is None else bias
        operations, done = [], 0
        for kind, packed, blocks in matrix.parts:
            places = address(packed), address(out) + 64 * done
            shape = [matrix.groups, blocks, chunk, width, int(add is not None), address(start) + 64 * done, 64]
            operations.append([f"product_{kind}", -(-blocks // chunk), ROWS, *integers.places, *places, *shape])
            done += blocks
        self.run(*operations, rows=len(x), threads=threads)
        return out


def address(array: np.ndarray) -> int:
    return array.ctypes.data


@cache
def _team(threads: int) -> Team:
    return Team(threads, "test")


@pytest.fixture(scope="session", autouse=True)
def teams() -> Iterator[None]:
    yield
    for threads in (1, 2, 3, 4):
        _team(threads).close()


@pytest.fixture(scope="session")
def workbench() -> Callable[..., Workbench]:
    """workbench("pairs"), or workbench(head_dim=80) for `PLAIN` sizes but for those given, and no products. Compiled
    once."""
    made: dict[Any, Workbench] = {}

    def build(way: str = "this", **sizes: Any) -> Workbench:
        have = binding.get_host_cpu_features()
        if missing := [feature for feature in WAYS[way][1] if not have.get(feature, False)]:
            pytest.skip(f"this processor has no {', '.join(missing)}")
        key = (way, *sorted(sizes.items()))
        if key not in made:
            made[key] = Workbench(way, PLAIN | ({"kinds": ()} if sizes else {}) | sizes)
        return made[key]

    return build


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """A way to multiply bytes."""
    return str(request.param)


@pytest.fixture
def integers() -> type[Integers]:
    """integers(rows, groups)"""
    return Integers


def stored_tensor(kind: str, rows: int, columns: int, seed: int = 0) -> WeightTensor:
    """A tensor of any type a file may have: random bits, and scales that make weights of about 0.1."""
    numbers = np.random.default_rng(seed)
    if kind in ("F32", "F16", "BF16"):
        values = (0.1 * numbers.standard_normal((rows, columns))).astype(np.float32)
        words = {"F32": values, "F16": values.astype("<f2"), "BF16": (values.view("<u4") >> 16).astype("<u2")}[kind]
        return WeightTensor(name="m", shape=(rows, columns), kind=kind, data=words.view(np.uint8))
    traits = KINDS[kind]
    blocks = numbers.integers(0, 256, (rows, columns // traits.block_values, traits.block_bytes), dtype=np.uint8)
    step = {"Q8_0": 0.001, "Q5_0": 0.01, "Q4_K": 0.0004, "Q6_K": 0.0001}.get(kind, 0.02)
    for at in {"Q6_K": (208,), "Q4_1": (0, 2), "Q4_K": (0, 2)}.get(kind, (0,)):
        scales = step * (1 + numbers.random((*blocks.shape[:2], 1)))
        blocks[..., at : at + 2] = scales.astype("<f2").view(np.uint8)
    if kind == "Q4_1":
        blocks[..., 2:4] = np.full((*blocks.shape[:2], 1), -7.5 * step, "<f2").view(np.uint8)
    return WeightTensor(name="m", shape=(rows, columns), kind=kind, data=blocks.reshape(rows, -1))


@pytest.fixture
def stored() -> Callable[..., WeightTensor]:
    """stored("Q4_K", rows, columns, seed=0)"""
    return stored_tensor


@pytest.fixture
def packed() -> Callable[..., PackedMatrix]:
    """packed(tensor, ...): their rows as one matrix."""

    def build(*tensors: WeightTensor) -> PackedMatrix:
        weights: Any = {str(i): tensor for i, tensor in enumerate(tensors)}
        rows, columns = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
        return PackedMatrix(weights, list(weights), rows, columns)

    return build
