"""Structs that refuse a field they do not know, and suggest the one that was meant."""

from __future__ import annotations

import difflib
from typing import Any

from msgspec import Struct, StructMeta

from llm_os.kernel.errors import ConfigError


class _StrictMeta(StructMeta):
    def __call__(cls, *args: Any, **fields: Any) -> Any:
        for name in fields.keys() - set(cls.__struct_fields__):
            near = difflib.get_close_matches(name, cls.__struct_fields__, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(cls.__struct_fields__)}"
            raise ConfigError(f"{cls.__name__} has no field {name!r}; {hint}")
        return super().__call__(*args, **fields)


class Strict(Struct, frozen=True, metaclass=_StrictMeta):
    """Base for what people fill in by hand."""
