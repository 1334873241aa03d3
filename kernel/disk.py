"""The kernel's way to journal and swap: which plugin keeps them, and a thread for each, so that neither waits for the
other. Decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from llm_os.kernel.config import Config, parse_bytes
from llm_os.kernel.errors import ConfigError
from llm_os.kernel.events import Tier
from llm_os.kernel.journal import Log, Record, Session
from llm_os.kernel.swap import SwapStore

if TYPE_CHECKING:
    from llm_os.kernel.plugins import Plugins

T = TypeVar("T")

_log = logging.getLogger("llm_os.state")


class Disk:
    """Raises ConfigError where no plugin keeps what the configuration asks for, and StoreError where it cannot."""

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.sessions: dict[int, Session] = {}
        self.last_pid = 0
        self._log: Log | None = None
        self._store: SwapStore | None = None
        self._journal = ThreadPoolExecutor(1, "llm-os-journal")  # threads start with the first operation
        self._swap = ThreadPoolExecutor(1, "llm-os-swap")
        if config.state is not None:
            self._log = plugins.open_log(config.state)
            self.sessions, self.last_pid = dict(self._log.sessions), self._log.last_pid
            if self._log.warning:
                _log.warning("%s", self._log.warning)
        if any(parse_bytes(field, getattr(config, field)) for field in ("swap_host", "swap_disk")):
            try:
                self._store = plugins.open_swap(config)
            except BaseException:
                self.close()
                raise

    def append(self, records: tuple[Record, ...]) -> Future[None]:
        assert self._log is not None
        return self._journal.submit(self._log.append, records)

    def put(self, contents: Future[tuple[bytes, ...]], slots: tuple[int, ...], tier: Tier) -> Future[None]:
        """Keep `contents` when they have been read from the device."""
        store, done = self._there(), Future[None]()

        def keep(contents: Future[tuple[bytes, ...]]) -> None:
            self._settle(done, lambda: store.put(slots, contents.result(), tier))

        contents.add_done_callback(keep)
        return done

    def get(self, slots: tuple[int, ...]) -> Future[list[bytes | None]]:
        """The contents of each slot; None where they are lost or damaged."""
        store = self._there()
        return self._swap.submit(lambda: [store.get(slot) for slot in slots])

    def demote(self, slots: tuple[int, ...]) -> Future[None]:
        return self._swap.submit(self._there().demote, slots)

    def discard(self, slots: tuple[int, ...]) -> None:
        self._swap.submit(self._there().discard, slots)

    def close(self) -> None:
        """After the last operation has landed."""
        self._journal.shutdown()
        self._swap.shutdown()
        try:
            if self._log is not None:
                self._log.close()
        finally:
            if self._store is not None:
                self._store.close()

    def _there(self) -> SwapStore:
        if self._store is None:
            raise ConfigError("nothing was configured to swap to")
        return self._store

    def _settle(self, done: Future[Any], work: Callable[[], object]) -> None:
        """Do `work` in the swap's thread, and settle `done` with what it gives."""

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        try:
            self._swap.submit(run)
        except RuntimeError as error:  # Python is exiting, and executors take no more work
            done.set_exception(error)
