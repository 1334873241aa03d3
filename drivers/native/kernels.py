"""All operations of a program, compiled for one model's sizes, or read from where an earlier run has left them.

Compiling takes a second or two and depends on a few numbers, so what comes of it is kept on disk, by a hash of all that
it comes from: the sources that write the operations, the sizes, the processor and LLVM. What is read there will be run:
so it must be the user's own file, which nobody else can write.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from ctypes import c_int64, c_void_p
from functools import cache, partial
from pathlib import Path
from typing import Any

from llvmlite import ir
from msgspec import Struct

from llm_os.drivers.native import attention, groups, machine, matrix, processor, program, rows, tiles
from llm_os.drivers.native.attention import write_attention
from llm_os.drivers.native.groups import Kind
from llm_os.drivers.native.machine import Function
from llm_os.drivers.native.matrix import write_product
from llm_os.drivers.native.processor import Processor
from llm_os.drivers.native.program import write_run
from llm_os.drivers.native.rows import (
    write_best,
    write_gate,
    write_gather,
    write_norm,
    write_norm_added,
    write_rotation,
    write_rounding,
)
from llm_os.drivers.store.store import home

_SOURCES = (attention, groups, machine, matrix, processor, program, rows, tiles)
_KEPT = 16  # files; each has some 100 kB
_CHECK = 32  # bytes of a file's hash, before its contents


class Sizes(Struct, frozen=True, kw_only=True):
    """What the operations are written for. All else that differs between models is a field of an operation."""

    head_dim: int
    group: int  # query heads of a key head
    rope_dims: tuple[int, ...]
    qk_norm: bool
    activation: str
    kinds: tuple[Kind, ...]


class Kernels:
    """Compiled operations. `run` is what `program.write_run` says; `codes` are the operations' by their names."""

    def __init__(self, sizes: Sizes, processor: Processor) -> None:
        file = home("cache") / "native" / f"{_key(sizes, processor)}.o"
        data = _read(file)
        if data is None:
            data = _compile(sizes, processor)
            _keep(file, data)
        self._code = processor.link(data)  # as long as `run` may be called
        self.run: Any = self._code.function("run", c_void_p, c_int64, c_int64, c_int64)
        self.codes = {name: code for code, name in enumerate(_writers(sizes, processor))}


@cache
def load_kernels(sizes: Sizes) -> Kernels:
    """Those for this processor; the same for all models of these sizes."""
    return Kernels(sizes, Processor())


def _writers(sizes: Sizes, processor: Processor) -> dict[str, Callable[[ir.Module], Function]]:
    """What writes each operation, in the order of their codes."""
    products = {f"product_{kind}": partial(write_product, processor=processor, kind=kind) for kind in sizes.kinds}
    rotations = {
        f"rotation_{dim}": partial(write_rotation, head_dim=sizes.head_dim, rope_dim=dim, qk_norm=sizes.qk_norm)
        for dim in sizes.rope_dims
    }
    return {
        **products,
        **rotations,
        "attention": partial(write_attention, head_dim=sizes.head_dim, group=sizes.group),
        "norm": write_norm,
        "norm_added": write_norm_added,
        "rounding": write_rounding,
        "gather": write_gather,
        "best": write_best,
        "gate": partial(write_gate, activation=sizes.activation),
    }


def _compile(sizes: Sizes, processor: Processor) -> bytes:
    module = ir.Module("llm-os")
    write_run(module, [write(module) for write in _writers(sizes, processor).values()])
    return processor.compile(module)


def _key(sizes: Sizes, processor: Processor) -> str:
    digest = hashlib.sha256(f"{sizes} {processor.identity}".encode())
    for file in (__file__, *(source.__file__ for source in _SOURCES)):
        digest.update(Path(file or "").read_bytes())
    return digest.hexdigest()


def _read(file: Path) -> bytes | None:
    """An object file that was kept; None where there is none, or none to be trusted."""
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                return None
            check, data = opened.read(_CHECK), opened.read()
    except OSError:
        return None
    return data if hashlib.sha256(data).digest() == check else None


def _keep(file: Path, data: bytes) -> None:
    """Write it for the next run, if that can be: whole or not at all. Of older ones only some stay."""
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as opened:
                opened.write(hashlib.sha256(data).digest() + data)
            Path(temporary).replace(file)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        for old in sorted(file.parent.iterdir(), key=lambda each: each.stat().st_mtime)[:-_KEPT]:
            old.unlink(missing_ok=True)
