"""Every option of a kernel, in one struct. No files, no environment variables: who calls decides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from llm_os.kernel.errors import ConfigError
from llm_os.kernel.strict import Strict

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

MAX_FRAMES = 2**24  # 32 TiB in frames of 2 MiB; the ledger keeps a byte for each


class Tenant(Strict, frozen=True, kw_only=True):
    """One tenant's share of the device, and its limits. None is no limit. Raises ConfigError."""

    weight: float = 1.0  # twice the weight, twice the tokens, when there is not enough for all
    max_processes: int | None = None  # live at once
    max_tokens: int | None = None  # of prompts and answers, in the life of the kernel
    max_pages: int | None = None  # of KV at once

    def __post_init__(self) -> None:
        if not 0.001 <= self.weight <= 1000:
            raise ConfigError(f"weight of Tenant is {self.weight}; it must be from 0.001 to 1000")
        for field in ("max_processes", "max_tokens", "max_pages"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise ConfigError(f"{field} of Tenant is {value}; it must be 0 or more")


class Config(Strict, frozen=True, kw_only=True):
    """How a kernel is built. Raises ConfigError for an unknown field or a value out of range."""

    driver: str = "auto"  # a registered driver; "auto" is cuda where there is a GPU, else cpu
    precision: Literal["fast", "exact"] = "fast"  # exact: float32, the same bits whatever the company
    memory: int | str | None = None  # the budget, "2GiB" or bytes; None is 80% of what is free at boot
    frame_size: int | str = "2MiB"  # the unit of the ledger
    page_tokens: int | None = None  # tokens per KV page; None fits pages to frames
    batch_tokens: int = 512  # the most tokens of one forward pass; longer prompts go in chunks
    batch_size: int = 64  # the most processes of one forward pass
    queue_limit: int = 1024  # the most live processes; more are refused at once
    queue_s: float | None = None  # refuse a request that has not run for the first time within so many seconds
    prefix_cache: bool = True  # keep KV for prompts of the same tenant that begin alike
    slice_s: float = 2.0  # models that do not fit together change after so long at the earliest
    aging_s: float = 10.0  # a class rises by one for each so long that somebody waits in it, up to the best here
    swap_host: int | str = 0  # host memory for KV that has to leave the device; 0 is none
    swap_disk: int | str = 0  # the same on disk, in a file that vanishes with the process
    swap_sealed: bool = False  # encrypt what is swapped to disk, with a key of this boot (needs `cryptography`)
    tenants: dict[str, Tenant] = {}  # shares and limits; whoever is not named has weight 1 and no limits
    state: Path | None = None  # directory of the journal: sessions continue after a crash; None keeps none
    threads: int | None = None  # compute threads of the cpu driver; None leaves torch's choice
    store: Path | None = None  # where pulled models live; None is the user's store
    policy: str = "fair"  # who of a class is served first: a registered policy, such as "fair" or "fifo"
    plugins: tuple[str, ...] = ()  # plugins to enable; "-NAME" turns one off that is on by default
    options: dict[str, dict[str, Any]] = {}  # what plugins are told, by plugin: see the plugin's own docs
    speculation: Literal["auto", "always", "off"] = "auto"  # check guesses of what comes next: where it is quicker
    draft_tokens: int = 15  # the most guesses for one process in one step
    hook_limit_s: float = 5.0  # a plugin's call that takes longer fails; after three failures in a row it is off

    def __post_init__(self) -> None:
        for field in ("batch_tokens", "batch_size", "queue_limit", "page_tokens", "threads", "draft_tokens"):
            value = getattr(self, field)
            if value is not None and not 1 <= value <= 2**24:
                raise ConfigError(f"{field} is {value!r}; it must be from 1 to {2**24}")
        for field in ("queue_s", "slice_s", "aging_s", "hook_limit_s"):
            seconds = getattr(self, field)
            if seconds is not None and not 0 < seconds <= 1e9:
                raise ConfigError(f"{field} is {seconds}; it must be more than 0 and at most 1e9 seconds")
        for field in ("swap_host", "swap_disk"):
            parse_bytes(field, getattr(self, field))
        if not 4096 <= self.frame_bytes <= 2**32:
            raise ConfigError(f"frame_size is {self.frame_size!r}; it must be from 4096 bytes to 4GiB")
        if self.memory is not None:
            frames = parse_bytes("memory", self.memory) // self.frame_bytes
            if not 1 <= frames <= MAX_FRAMES:
                raise ConfigError(
                    f"memory is {self.memory!r}; it must hold 1 to {MAX_FRAMES} frames of {self.frame_bytes} bytes"
                )

    @property
    def frame_bytes(self) -> int:
        return parse_bytes("frame_size", self.frame_size)

    def budget(self, free_bytes: int) -> int:
        """Bytes that the kernel may use of a device that has `free_bytes` free."""
        if self.memory is not None:
            return parse_bytes("memory", self.memory)
        return min(free_bytes * 8 // 10, MAX_FRAMES * self.frame_bytes)


def parse_bytes(field: str, value: int | str) -> int:
    """ "2GiB", "500 MB", "1.5g" or a number of bytes. K, M, G, T alone are binary. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,6})?)\s*([a-z]*)", str(value).strip(), re.IGNORECASE)
    if not match or match[2].upper() not in _UNITS:
        raise ConfigError(f"{field} is {value!r}; write bytes or a size such as 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def show_bytes(size: int) -> str:
    """As people read it: "656 MiB", "1.5 GiB", "0 B"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size} B"
