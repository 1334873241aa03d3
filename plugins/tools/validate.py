"""Does a value fit a JSON schema? The part of JSON Schema that tools use; what it does not know it lets pass.

Knows: type, enum, const, properties, required, additionalProperties, items, prefixItems, minimum, maximum, their
exclusive forms, min/maxLength, min/maxItems, anyOf, oneOf, allOf, and $ref into $defs. Not `pattern`: a stranger's
regular expression on a stranger's text may take for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_STEPS = 100_000  # looks at a value, for one question


class Misfit(ValueError):
    """Says where, and what would fit."""


def check(value: Any, schema: Mapping[str, Any]) -> None:
    """Raises Misfit, in words for whoever made the value."""
    _Check(schema).check(value, schema, "")


class _Check:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._steps = 0

    def check(self, value: Any, schema: Any, at: str) -> None:
        self._steps += 1
        if self._steps > _STEPS:
            raise Misfit("it is too large to be checked")
        if schema is False:
            raise Misfit(f"{at or 'the arguments'}: nothing may be here")
        if not isinstance(schema, Mapping):
            return
        where = at or "the arguments"
        if (reference := schema.get("$ref")) is not None:
            self.check(value, self._resolve(reference), at)
        self._check_kind(value, schema, where)
        for part in schema.get("allOf", ()):
            self.check(value, part, at)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                self._check_any(value, schema[key], at)
        if isinstance(value, dict):
            self._check_object(value, schema, at)
        elif isinstance(value, list):
            self._check_array(value, schema, where)
        elif isinstance(value, str):
            _check_size(len(value), schema, "Length", where, "characters")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_range(value, schema, where)

    def _check_kind(self, value: Any, schema: Mapping[str, Any], where: str) -> None:
        kinds = schema.get("type", ())
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        if kinds and not any(_is(value, kind) for kind in kinds):
            raise Misfit(f"{where} is {_shown(value)}; it must be of type {' or '.join(map(str, kinds))}")
        if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
            raise Misfit(f"{where} is {_shown(value)}; it must be one of {_shown(list(schema['enum']))}")
        if "const" in schema and not _same(value, schema["const"]):
            raise Misfit(f"{where} is {_shown(value)}; it must be {_shown(schema['const'])}")

    def _check_any(self, value: Any, schemas: Any, at: str) -> None:
        why: list[str] = []
        for schema in schemas:
            try:
                self.check(value, schema, at)
            except Misfit as misfit:
                why.append(str(misfit))
            else:
                return
        raise Misfit("; or ".join(why[:4])[:500] or f"{at}: nothing fits")

    def _check_object(self, value: dict[str, Any], schema: Mapping[str, Any], at: str) -> None:
        properties = schema.get("properties", {})
        if missing := [name for name in schema.get("required", ()) if name not in value]:
            raise Misfit(f"{_path(at, missing[0])} is missing")
        for name, item in value.items():
            if name in properties:
                self.check(item, properties[name], _path(at, name))
            elif (others := schema.get("additionalProperties", True)) is False:
                known = ", ".join(properties) or "none"
                raise Misfit(f"there is no argument {_path(at, name)!r}; there are: {known}")
            else:
                self.check(item, others, _path(at, name))

    def _check_array(self, value: list[Any], schema: Mapping[str, Any], where: str) -> None:
        _check_size(len(value), schema, "Items", where, "entries")
        first = schema.get("prefixItems", ())
        for index, item in enumerate(value):
            self.check(item, first[index] if index < len(first) else schema.get("items", True), f"{where}[{index}]")

    def _resolve(self, reference: Any) -> Any:
        found: Any = self._root
        if not isinstance(reference, str) or not reference.startswith("#"):
            return True
        for part in reference.lstrip("#/").split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return True if found is None else found


def _is(value: Any, kind: Any) -> bool:
    if kind == "integer":
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and float.is_integer(value)
        )
    if isinstance(value, bool):
        return bool(kind == "boolean")
    known = _TYPES.get(kind, (object,))
    return isinstance(value, known)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _check_range(value: float, schema: Mapping[str, Any], where: str) -> None:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if (low is not None and value < low) or (high is not None and value > high):
        raise Misfit(f"{where} is {_shown(value)}; it must be from {low} to {high}")
    if (above is not None and value <= above) or (below is not None and value >= below):
        raise Misfit(f"{where} is {_shown(value)}; it must be between {above} and {below}")


def _check_size(size: int, schema: Mapping[str, Any], what: str, where: str, unit: str) -> None:
    low, high = schema.get(f"min{what}"), schema.get(f"max{what}")
    if (low is not None and size < low) or (high is not None and size > high):
        raise Misfit(f"{where} has {size} {unit}; it must have from {low} to {high}")


def _path(at: str, name: str) -> str:
    return f"{at}.{name}"[:200] if at else str(name)[:200]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
