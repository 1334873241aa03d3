"""What native code is compiled for, and what differs between processors. Knows no model."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from llvmlite import binding, ir

from llm_os.drivers.native.machine import I8, I16, I32, LANES, Function, Value, vector


def can_compile() -> bool:
    """Whether this processor has what the code needs: numbers of 16 bits, and products that are rounded once."""
    if sys.platform not in ("linux", "darwin"):
        return False
    return Processor().features >= {"+f16c", "+fma", "+avx2"} or platform.machine() in ("arm64", "aarch64")


class Processor:
    """What code is compiled for: this machine's processor, or an older one of its kind."""

    def __init__(self, name: str | None = None) -> None:
        """`name` is LLVM's ("haswell", say); None is the processor that this runs on."""
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        features = binding.get_host_cpu_features().flatten() if name is None else ""
        target = binding.Target.from_default_triple()
        self._name = name or binding.get_host_cpu_name()
        self._machine = target.create_target_machine(cpu=self._name, features=features, opt=2, jit=True)
        self.features = frozenset((features or _FEATURES.get(name or "", "")).split(","))

    @cached_property
    def has_tiles(self) -> bool:
        """Whether it multiplies matrices, with AMX. Asks the system for permission, which holds for the process."""
        return "+amx-int8" in self.features and _may_use_tiles()

    @property
    def way(self) -> str:
        """How integers are multiplied here, for people to read."""
        if self.has_tiles:
            return "AVX-512 VNNI and AMX"
        if "+avx512vnni" in self.features:
            return "AVX-512 VNNI"
        return "AVX-VNNI" if "+avxvnni" in self.features else "pairs of 16 bits"

    def dot(self, a: Sequence[Value], b: Sequence[Value], total: Value) -> Value:
        """`total`, 16 integers of 32 bits, plus the products of bytes 4i to 4i+3 of `a` and `b` in lane i, for each
        pair of 64 bytes. `a` is from 0 to 255, `b` from -128 to 127. Exact on every processor."""
        f = total.function
        for left, right in zip(a, b, strict=True):
            if "+avx512vnni" in self.features:
                total = f.intrinsic("llvm.x86.avx512.vpdpbusd.512", total, left, right.bits(vector(I8, 64)))
            elif "+avxvnni" in self.features:
                halves = [
                    f.intrinsic(
                        "llvm.x86.avx512.vpdpbusd.256",
                        f.picked(total, range(i * 8, i * 8 + 8)),
                        f.picked(left, range(i * 32, i * 32 + 32)),
                        f.picked(right.bits(vector(I8, 64)), range(i * 32, i * 32 + 32)),
                    )
                    for i in range(2)
                ]
                total = f.joined(*halves)
            else:
                total = total + _in_pairs(f, left, right)
        return total

    @property
    def identity(self) -> str:
        """Names the processor, what it can do, and who compiles for it."""
        llvm = ".".join(map(str, binding.llvm_version_info))
        return f"{self._name} {self.has_tiles} {','.join(sorted(self.features))} llvm {llvm} {self._machine.triple}"

    def compile(self, module: ir.Module) -> bytes:
        """An object file."""
        parsed = binding.parse_assembly(str(module))
        parsed.verify()
        options = binding.PipelineTuningOptions(speed_level=2)
        options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
        passes = binding.create_pass_builder(self._machine, options)
        passes.getModulePassManager().run(parsed, passes)
        data: bytes = self._machine.emit_object(parsed)
        return data

    def link(self, data: bytes) -> Code:
        return Code(data, self._machine)


_FEATURES = {"alderlake": "+avxvnni", "cascadelake": "+avx512vnni"}
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def _may_use_tiles() -> bool:
    """Linux lets a process have the large registers of AMX when it asks (arch_prctl(2), ARCH_REQ_XCOMP_PERM)."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def _in_pairs(f: Function, a: Value, b: Value) -> Value:
    """Products of 16 bits, two by two, as processors without an instruction for four bytes have them."""
    words = vector(I16, 2 * LANES)
    left, right = a.bits(words), b.bits(words)
    return _pair_sums(f, left & 255, (right << 8).shifted(8)) + _pair_sums(f, left >> 8, right.shifted(8))


def _pair_sums(f: Function, a: Value, b: Value) -> Value:
    products = a.to(vector(I32, 2 * LANES)) * b.to(vector(I32, 2 * LANES))
    return f.picked(products, range(0, 2 * LANES, 2)) + f.picked(products, range(1, 2 * LANES, 2))


class Code:
    """Compiled functions. Lives as long as somebody may call them."""

    def __init__(self, data: bytes, machine: Any) -> None:
        """`data` is an object file."""
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        self._engine.add_object_file(binding.ObjectFileRef.from_data(data))
        self._engine.finalize_object()

    def function(self, name: str, *arguments: Any) -> Any:
        """It as a ctypes function without a result, which lets other threads run."""
        return ctypes.CFUNCTYPE(None, *arguments)(self._engine.get_function_address(name))
