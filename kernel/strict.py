"""Structs that people fill in by hand: an unknown field, a wrong type or a value out of range is refused by name.

msgspec checks types when it decodes, not when a struct is made in Python; this does both. Containers are copied, so
that what was checked is what is used.
"""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any, ClassVar

import msgspec
from msgspec import Struct, StructMeta, structs

from llm_os.kernel.errors import ConfigError, Error


@cache
def _types(cls: Any) -> dict[str, Any]:
    """The type of each field, as msgspec works it out from the annotations: that takes its time."""
    return {field.name: field.type for field in structs.fields(cls)}


class _StrictMeta(StructMeta):
    def __call__(cls, *args: Any, **values: Any) -> Any:
        error: type[Error] = cls.error  # type: ignore[attr-defined]
        fields = _types(cls)
        for name, value in values.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(fields)}"
                raise error(f"{cls.__name__} has no field {name!r}; {hint}")
            try:
                values[name] = msgspec.convert(value, fields[name])
            except msgspec.ValidationError as mismatch:
                raise error(f"{name} of {cls.__name__}: {mismatch}") from None
        try:
            return super().__call__(*args, **values)
        except TypeError as missing:  # a required field, or a positional argument
            raise error(f"{cls.__name__}: {missing}") from None


class Strict(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=_StrictMeta):
    """Base of such structs. `error` is what a bad field raises."""

    error: ClassVar[type[Error]] = ConfigError
