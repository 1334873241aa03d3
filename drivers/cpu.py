"""The `cpu` driver: torch on the host's processor. Probing costs no torch operation and never fails."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from llm_os.kernel.driver import DeviceInfo

if TYPE_CHECKING:
    from llm_os.drivers.torch.driver import TorchDriver
    from llm_os.kernel.config import Config

# What the driver's speed hangs on, by Linux's names.
_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2**63 where it has no limit
PAGE_TOKENS = tuple(range(8, 33))


def open_cpu(config: Config) -> TorchDriver:
    """Start the driver. Allocates nothing until a model is loaded."""
    import torch

    from llm_os.drivers.torch.driver import TorchDriver

    return TorchDriver(config, torch.device("cpu"), PAGE_TOKENS, lambda: probe_cpu(config.threads))


def probe_cpu(threads: int | None = None) -> DeviceInfo:
    """The processor, its memory (within the limits of the process's control group) and torch's build."""
    total, free = _memory()
    unavailable = None
    details = {"python": platform.python_version()}
    try:
        import torch

        threads = threads or torch.get_num_threads()
        details["torch"] = f"{torch.__version__} ({_build(torch.version.cuda, torch.version.hip)})"
        details["kernels"] = torch.backends.cpu.get_cpu_capability()
        details["fast mode"] = _native()
    except Exception as error:  # a broken installation can fail in any way
        unavailable = f"torch cannot be imported: {' '.join(str(error).split())[:200]}"
    name, flags = _processor()
    return DeviceInfo(
        driver="cpu",
        device=f"{name}, {threads or os.cpu_count() or 1} threads",
        total_bytes=0 if unavailable else total,
        free_bytes=0 if unavailable else free,
        features=tuple(feature for feature in _FEATURES if feature in flags),
        details=details,
        unavailable=unavailable,
    )


def _native() -> str:
    """The instructions of fast mode, or that it has none here."""
    from llm_os.drivers.native.processor import Processor, can_compile

    return f"native code, {Processor().way}" if can_compile() else "float32 in torch: native code needs AVX2 or ARM"


def _build(cuda: str | None, hip: str | None) -> str:
    return f"CUDA {cuda} build" if cuda else f"ROCm {hip} build" if hip else "CPU build"


def _processor() -> tuple[str, frozenset[str]]:
    name, flags = platform.processor() or platform.machine() or "unknown processor", frozenset[str]()
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
            break
    return name, flags


def _memory() -> tuple[int, int]:
    """Total and free bytes for this process; 0 where the system does not say."""
    total = free = 0
    for line in _lines("/proc/meminfo"):
        key, _, value = line.partition(":")
        if key == "MemTotal":
            total = int(value.split()[0]) * 1024
        elif key == "MemAvailable":
            free = int(value.split()[0]) * 1024
    if not total and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, used in _group_limits():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _group_limits() -> list[tuple[int, int]]:
    """(limit, in use) of each control group that this process is in and that has a memory limit; cgroup v1 and v2."""
    limits = []
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.strip().split(":", 2)
        if not controllers:
            root, limit_name, used_name = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit_name, used_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and limit < _NO_LIMIT:
                cached = _inactive_file(folder / "memory.stat")
                limits.append((limit, max(0, (used or 0) - cached)))
    return limits


def _inactive_file(path: Path) -> int:
    """Bytes of file cache in a group's account: given up before the limit bites."""
    for line in _lines(str(path)):
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    lines = _lines(str(path))
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
