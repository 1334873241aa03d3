"""Model files, offered to the kernel through the `open_image` hook. Imports nothing heavy until a file is opened."""

from __future__ import annotations

from llm_os.kernel.config import Config
from llm_os.kernel.hookspecs import hookimpl
from llm_os.kernel.image import Image


@hookimpl
def open_image(model: str, config: Config) -> Image | None:
    """Any name that the store can resolve: an alias, a path, `hf:` or `pip:`. Never downloads."""
    if model.startswith("sim:"):
        return None
    from llm_os.drivers.formats.image import open_image as open_file
    from llm_os.drivers.store import Store

    return open_file(Store(config.store).resolve(model), model)
