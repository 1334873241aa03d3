"""Passes: what may be done to a model between its file and the device. The contract; no arithmetic."""

from __future__ import annotations

from typing import Protocol

from llm_os.kernel.image import Image


class Pass(Protocol):
    """Changes a model's weights at load. `Request.model` names it after a plus sign: "smollm2:135m+int8".

    Several apply from left to right. KV and prefixes are never shared between a model and what a pass made of it. What
    `apply` returns is made by `llm_os.change_weights` (docs/plugins/quantize.md has an example).
    """

    def apply(self, image: Image) -> Image:
        """The changed model, opened. Called once per model and load, from a worker thread; it takes over `image` and
        closes it with its own `close`. Weights are changed when the driver reads them, not here. Raises Unsupported."""
        ...
