"""Hyperparameters as a file spells them, read one by one with their limits. Knows no particular key.

Every value is untrusted: a wrong type or a value out of range is a FormatError that names file, field and limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from llm_os.drivers.formats.mapped import shown
from llm_os.kernel.errors import FormatError, Unsupported

MAX_LAYERS = 1000
MAX_VOCAB = 1 << 24
MAX_HIDDEN = 1 << 17
MAX_INTERMEDIATE = 1 << 20
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12
MAX_CONTEXT = 1 << 27
MAX_WINDOW = 1 << 31


class Fields:
    """A mapping from a file, and where it stands: `prefix` comes before each key, `section` only in messages.

    A `default` of ... means that the field must be there. null counts as absent.
    """

    def __init__(self, values: Mapping[str, Any], file: str, *, prefix: str = "", section: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self._section = section
        self.file = file

    def __contains__(self, key: str) -> bool:
        """Whether it stands in the file, be it as null."""
        return self._prefix + key in self._values

    def get(self, key: str) -> Any:
        """As it stands in the file; None when absent."""
        return self._values.get(self._prefix + key)

    def integer(self, key: str, low: int, high: int, default: Any = ...) -> int:
        value = self._value(key, default)
        if type(value) is not int:
            self.fail(key, f"is {shown(value)}; it must be an integer from {low} to {high}")
        if not low <= value <= high:
            self.fail(key, f"is {shown(value)}; it must be from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: Any = ...) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float) or not low <= value <= high:  # NaN fails the comparison
            self.fail(key, f"is {shown(value)}; it must be a number from {low:g} to {high:g}")
        return float(value)

    def numbers(self, key: str, low: float, high: float, count: int) -> tuple[float, ...]:
        value = self._value(key, ...)
        if not isinstance(value, list) or len(value) != count:
            found = f"has {len(value)} elements" if isinstance(value, list) else f"is {shown(value)}"
            self.fail(key, f"{found}; it must be a list of {count} numbers")
        return tuple(Fields({key: item}, self.file, section=self._section).number(key, low, high) for item in value)

    def flag(self, key: str, default: Any = ...) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            self.fail(key, f"is {shown(value)}; it must be true or false")
        return value

    def text(self, key: str, default: Any = ...) -> str:
        value = self._value(key, default)
        if type(value) is not str:
            self.fail(key, f"is {shown(value)}; it must be a string")
        return value

    def section(self, key: str) -> Fields | None:
        """A nested mapping; None when absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, f"is {shown(value)}; it must be an object")
        return Fields(value, self.file, section=f"{self._name(key)}.")

    def fail(self, key: str, problem: str) -> NoReturn:
        raise FormatError(f"{self.file}: {self._name(key)} {problem}")

    def unsupported(self, key: str, problem: str) -> NoReturn:
        raise Unsupported(f"{self.file}: {self._name(key)} is {shown(self.get(key))}; {problem}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            if default is ...:
                self.fail(key, "is missing")
            return default
        return value

    def _name(self, key: str) -> str:
        return f"{self._section}{self._prefix}{key}"
