"""The facade's own functions: short ways through the kernel for a script or a notebook."""

from __future__ import annotations

from typing import Any

from llm_os.kernel.config import Config
from llm_os.kernel.driver import DeviceInfo
from llm_os.kernel.image import Image
from llm_os.kernel.kernel import Kernel
from llm_os.kernel.plugins import Plugins
from llm_os.kernel.request import Request, Sampling


def generate(model: str, prompt: str, *, config: Config | None = None, **sampling: Any) -> str:
    """One answer to one chat message, blocking: boots a kernel, loads the model, answers, gives everything back.

    Keyword arguments are fields of Sampling. Raises what Kernel and its streams raise.
    """
    request = Request(model=model, messages=[{"role": "user", "content": prompt}], sampling=Sampling(**sampling))
    with Kernel(config) as kernel:
        return kernel.stream(request).result().text


def probe(config: Config | None = None) -> list[DeviceInfo]:
    """What every registered driver finds on this machine."""
    return Plugins(config or Config()).probe()


def plugins(config: Config | None = None) -> list[str]:
    """Names of the plugins that a kernel with this configuration would load."""
    return Plugins(config or Config()).names


def open_image(model: str, config: Config | None = None) -> Image:
    """The model's description and tokenizer as a kernel with this configuration would see them; close it after use.

    Loads no weights and never downloads. Raises ModelNotFound, FormatError or Unsupported.
    """
    return Plugins(config or Config()).open_image(model)
