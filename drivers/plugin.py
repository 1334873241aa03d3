"""The built-in drivers, offered through the same hook as anybody's. Imports nothing heavy until one is used."""

from __future__ import annotations

from llm_os.kernel.config import Config
from llm_os.kernel.driver import DeviceInfo, Driver
from llm_os.kernel.hookspecs import RegisterDriver, hookimpl
from llm_os.kernel.image import Image


@hookimpl
def register_drivers(register: RegisterDriver) -> None:
    register("cpu", _open_cpu, _probe_cpu)
    register("cuda", _open_cuda, _probe_cuda)
    register("sim", _open_sim, _probe_sim)


@hookimpl
def open_image(model: str, config: Config) -> Image | None:
    """`sim:NAME` needs no file: the sim driver brings the image."""
    if not model.startswith("sim:"):
        return None
    from llm_os.drivers.sim import SimImage

    return SimImage.parse(model)


def _open_cpu(config: Config) -> Driver:
    from llm_os.drivers.cpu import open_cpu

    return open_cpu(config)


def _probe_cpu() -> DeviceInfo:
    from llm_os.drivers.cpu import probe_cpu

    return probe_cpu()


def _open_cuda(config: Config) -> Driver:
    from llm_os.drivers.cuda import open_cuda

    return open_cuda(config)


def _probe_cuda() -> DeviceInfo:
    from llm_os.drivers.cuda import probe_cuda

    return probe_cuda()


def _open_sim(config: Config) -> Driver:
    from llm_os.drivers.sim import SimDriver

    return SimDriver(config)


def _probe_sim() -> DeviceInfo:
    from llm_os.drivers.sim import probe_sim

    return probe_sim()
