"""Keeps what is swapped to disk unreadable for whoever finds it there. Knows no files and no models."""

from __future__ import annotations

import itertools
import os
from typing import Protocol

from llm_os.kernel.errors import ConfigError


class Cipher(Protocol):
    """Called from several threads. The sealed bytes of contents of one size have one size."""

    def seal(self, slot: int, contents: bytes) -> bytes: ...

    def open(self, slot: int, sealed: bytes) -> bytes:
        """What was sealed for this slot. Raises ValueError if it was altered, or sealed for another slot or boot."""
        ...


class AesGcm:
    """AES-256-GCM with a key that is never stored: what it sealed can be opened by this object only.

    Adds 28 bytes: a nonce, counted so that none is ever used twice with this key, and the tag. The slot is
    authenticated with the contents. Raises ConfigError where the package `cryptography` is missing.
    """

    def __init__(self) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            raise ConfigError(
                "encrypting swap needs the package cryptography; pip install 'llm-os-runtime[cipher]'"
            ) from None
        self._cipher = AESGCM(os.urandom(32))
        self._altered = InvalidTag
        self._nonces = itertools.count()

    def seal(self, slot: int, contents: bytes) -> bytes:
        nonce = next(self._nonces).to_bytes(12, "little")
        return nonce + self._cipher.encrypt(nonce, contents, slot.to_bytes(8, "little"))

    def open(self, slot: int, sealed: bytes) -> bytes:
        try:
            return self._cipher.decrypt(sealed[:12], sealed[12:], slot.to_bytes(8, "little"))
        except (self._altered, ValueError):  # the latter for fewer bytes than a nonce has
            raise ValueError(f"what lies in slot {slot} is not what was sealed there") from None
