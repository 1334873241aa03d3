"""The `cuda` driver in its simplest form: the tensor code of the cpu driver on the first NVIDIA GPU.

What is missing is one arena for weights and KV. KV of all models shares one reservation of the budget's frames, but
memory is taken for all of it with the first model and given back when the last is released, where a CPU takes a frame
when it is written; and weights lie outside. So give it a `memory` that leaves room beside the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_os.kernel.driver import DeviceInfo
from llm_os.kernel.errors import DriverError

if TYPE_CHECKING:
    from llm_os.drivers.torch.driver import TorchDriver
    from llm_os.kernel.config import Config

PAGE_TOKENS = tuple(range(16, 257, 16))


def open_cuda(config: Config) -> TorchDriver:
    """Start the driver on the first GPU. Raises DriverError, with the reason, where there is none."""
    info = probe_cuda()
    if info.unavailable is not None:
        raise DriverError(f"the cuda driver cannot be used: {info.unavailable}; use the cpu driver")
    import torch

    from llm_os.drivers.torch.driver import TorchDriver

    return TorchDriver(config, torch.device("cuda", 0), PAGE_TOKENS, probe_cuda)


def probe_cuda() -> DeviceInfo:
    """The first GPU as NVML sees it, and whether torch can use it."""
    try:
        return _probe()
    except Exception as error:  # NVML, torch and broken installations of either fail in any way
        return _unavailable(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _unavailable(reason: str) -> DeviceInfo:
    return DeviceInfo(driver="cuda", device="none", total_bytes=0, free_bytes=0, unavailable=reason)


def _probe() -> DeviceInfo:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return _unavailable("no NVIDIA driver found")
    try:
        if pynvml.nvmlDeviceGetCount() == 0:
            return _unavailable("the NVIDIA driver sees no GPU")
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(gpu)
        name, version = _text(pynvml.nvmlDeviceGetName(gpu)), _text(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
    reason = _why_torch_cannot()
    return DeviceInfo(
        driver="cuda",
        device=name,
        total_bytes=0 if reason else int(memory.total),
        free_bytes=0 if reason else int(memory.free),
        features=(f"sm_{major}{minor}", *(("bf16",) if major >= 8 else ())),
        details={"driver": version},
        unavailable=reason,
    )


def _why_torch_cannot() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU that its CUDA {torch.version.cuda} supports"
    return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
