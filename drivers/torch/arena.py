"""The KV memory of one device: the frames of the kernel's ledger, and whose pages lie in each. Knows no tensor shapes
but through `pool`, no weights, no threads of its own.

    frame    |   0   |   1   |   2   |   3   | ...       one reservation; the pools of all models are views of it
    owner    |   -   |   a   |   a   |   b   | ...       who wrote a page there last

A frame that passes from one model to another is the same memory, written again. A frame that passes to weights goes
back to the system first, so that KV never takes more than the ledger's frames.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable
from threading import Lock

import torch
from torch import Tensor

from llm_os.drivers.formats.architecture import Architecture
from llm_os.drivers.torch.pool import KvPool
from llm_os.kernel.driver import Extent
from llm_os.kernel.errors import DriverError

_MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


class Arena:
    """Frames, and the pools that share them. Safe to call from any thread."""

    def __init__(self, frame_bytes: int, frames: int, device: torch.device) -> None:
        """`frames` are the most that the ledger can have. On Linux's CPUs so many addresses are reserved; elsewhere
        memory for the frames of the first pool."""
        self._frame_bytes = frame_bytes
        self._stride = -(-frame_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._lazy = device.type == "cpu" and sys.platform == "linux"
        self._frames = frames if self._lazy else 0
        self._device = device
        self._reservation: _Reservation | None = None
        self._pools: dict[str, KvPool] = {}
        self._owners: dict[int, str] = {}
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held: of the frames that hold pages where memory is committed by writing, else of all frames.

        Frames count whole, because a page's heads lie all over its frame.
        """
        if self._lazy:
            return len(self._owners) * self._stride
        reservation = self._reservation
        return 0 if reservation is None else reservation.frames * self._stride

    def pool(self, model: str) -> KvPool:
        """Raises DriverError when the model has no KV here."""
        pool = self._pools.get(model)
        if pool is None:
            raise DriverError(f"model {model!r} has no KV on the {self._device.type} device; load it first")
        return pool

    def holds(self, model: str) -> bool:
        return model in self._pools

    def open(
        self, model: str, architecture: Architecture, page_tokens: int, pages: int, dtype: torch.dtype = torch.float32
    ) -> KvPool:
        """The pool that the model kept, or a new one. Raises DriverError when the kept one was cut in another way."""
        shape = (len(architecture.layers), 2, architecture.kv_heads, page_tokens, architecture.head_dim)
        with self._lock:
            kept = self._pools.get(model)
            if kept is not None:
                if (kept.page_shape, kept.pages, kept.dtype) != (shape, pages, dtype):
                    raise DriverError(
                        f"model {model!r} kept KV of {kept.pages} pages of {kept.page_tokens} tokens, not of {pages} "
                        f"pages of {page_tokens} tokens of this model; release it before loading"
                    )
                return kept
            page_bytes = dtype.itemsize * torch.Size(shape).numel()
            slots = self._frame_bytes // page_bytes
            if slots == 0:
                raise DriverError(
                    f"a KV page of {page_tokens} tokens of model {model!r} has {page_bytes} bytes, more than a frame "
                    f"of {self._frame_bytes}; raise frame_size"
                )
            frames = -(-pages // slots)
            if self._reservation is None:
                self._reservation = _Reservation(max(frames, self._frames), self._stride, self._device)
            if frames > self._reservation.frames:
                raise DriverError(
                    f"model {model!r} names {frames} frames of KV; the {self._device.type} device has "
                    f"{self._reservation.frames}; lower memory or release all models"
                )
            pool = self._pools[model] = KvPool(self._reservation.tensor[:frames].view(dtype), shape, slots, pages)
            return pool

    def claim(self, model: str, frames: Iterable[int]) -> None:
        """These frames are about to be written by `model`. What other models had there is lost."""
        with self._lock:
            for frame in frames:
                self._owners[frame] = model

    def owns(self, model: str, frames: Iterable[int]) -> bool:
        """Whether the model's pages are still in all of these frames."""
        with self._lock:
            return all(self._owners.get(frame) == model for frame in frames)

    def displace(self, extents: Iterable[Extent]) -> None:
        """Weights are about to take these frames: give back what pages of any model take there."""
        with self._lock:
            ranges = [range(extent.frame, extent.frame + extent.frames) for extent in extents]
            self._give_back([frame for frame in self._owners if any(frame in taken for taken in ranges)])

    def release(self, model: str) -> None:
        """Forget the model's pool and give its frames back; with the last pool, the reservation."""
        with self._lock:
            self._pools.pop(model, None)
            self._give_back([frame for frame, owner in self._owners.items() if owner == model])
            if not self._pools:
                self._reservation = None

    def clear(self) -> None:
        """Release all."""
        for model in tuple(self._pools):
            self.release(model)

    def _give_back(self, frames: list[int]) -> None:
        # Under the lock: a frame must not be written by its next owner before it has gone.
        for frame in frames:
            del self._owners[frame]
        if self._reservation is not None and frames:
            self._reservation.drop(frames)


class _Reservation:
    """Memory for all frames, [frames, float32 values of one], zeros at first."""

    def __init__(self, frames: int, stride: int, device: torch.device) -> None:
        self.frames = frames
        self._stride = stride
        self._mapping: mmap.mmap | None = None
        if device.type == "cpu" and sys.platform == "linux":
            # A mapping of our own rather than `torch.empty`: the allocator may keep what it is given back.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            self._mapping = mmap.mmap(-1, frames * stride, flags=flags)
            self._mapping.madvise(mmap.MADV_NOHUGEPAGE)
            flat = torch.frombuffer(self._mapping, dtype=torch.float32)
        else:
            flat = torch.zeros(frames * stride // 4, device=device)
        self.tensor: Tensor = flat.view(frames, stride // 4)

    def drop(self, frames: Iterable[int]) -> None:
        """Give the memory of these frames back, where it was committed by writing."""
        if self._mapping is None:
            return
        start = end = 0
        for frame in sorted(frames):
            if frame != end:
                self._drop(start, end)
                start = frame
            end = frame + 1
        self._drop(start, end)

    def _drop(self, start: int, end: int) -> None:
        if self._mapping is not None and start < end:
            self._mapping.madvise(mmap.MADV_DONTNEED, start * self._stride, (end - start) * self._stride)
