"""The built-in journal and swap. Imports nothing heavy: hooks are called at every boot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_os.kernel.hookspecs import hookimpl

if TYPE_CHECKING:
    from llm_os.drivers.persistence.log import FileLog
    from llm_os.drivers.persistence.swap import SlotStore
    from llm_os.kernel.config import Config


@hookimpl
def open_log(folder: Path) -> FileLog:
    from llm_os.drivers.persistence.log import FileLog

    return FileLog(folder)


@hookimpl
def open_swap(config: Config) -> SlotStore:
    """On disk in the state directory, or where the system keeps temporary files."""
    import tempfile

    from llm_os.drivers.persistence.cipher import AesGcm
    from llm_os.drivers.persistence.swap import SlotStore
    from llm_os.kernel.config import parse_bytes

    cipher = AesGcm() if config.swap_sealed else None
    if config.state is not None or not parse_bytes("swap_disk", config.swap_disk):
        return SlotStore(config.state, cipher)
    with tempfile.TemporaryDirectory(prefix="llm-os-", ignore_cleanup_errors=True) as folder:
        return SlotStore(Path(folder), cipher)  # the file has no name any more when the folder goes
