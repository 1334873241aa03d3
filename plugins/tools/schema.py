"""Python functions with type hints become tools. Knows type hints and docstrings; asks and runs nothing.

def weather(city: str, days: int = 1) -> str:            {"type": "object", "properties": {
    \"\"\"The weather in a city.                                  "city": {"type": "string", "description": …},
                                                  ──>        "days": {"type": "integer", "default": 1, …}},
    Args:                                                "required": ["city"], "additionalProperties": false}
        city: its name
        days: how many, from today
    \"\"\"
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
from msgspec import NODEFAULT, Struct

from llm_os import ConfigError, Tool

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ARGUMENTS = "Arguments"


def make_tool(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    description: str | None = None,
    argument_class: Callable[[Mapping[str, Any]], str] | None = None,
    timeout_s: float = 30.0,
    output_limit: int = 65536,
    expected_s: float | None = None,
    needs_permission: bool = True,
) -> Tool:
    """A Tool that calls `function`, a plain or a coroutine function, with arguments of the types that it names.

    Name, description and what parameters mean are the function's own and its docstring's (Google's, numpy's or
    Sphinx's way), or `Annotated[T, msgspec.Meta(description=...)]`. The rest is as for `Tool`. Raises ConfigError for a
    function that models cannot be told of: a parameter without a type hint, or of a type that JSON has not.
    """
    called = str(name or getattr(function, "__name__", ""))
    if not is_name(called):
        raise ConfigError(f"a tool is named {called!r}; give name=, 1 to 64 letters, digits, _ or -")
    about, meanings = _docstring(inspect.getdoc(function) or "")
    about = about if description is None else description
    if not about:
        raise ConfigError(f"tool {called!r} has no docstring; a model chooses by it: write one, or give description=")
    arguments = _struct(function, called, meanings)
    return Tool(
        name=called,
        description=about,
        parameters=_schema(arguments, called),
        call=_caller(function, arguments),
        argument_class=argument_class,
        timeout_s=timeout_s,
        output_limit=output_limit,
        expected_s=expected_s,
        needs_permission=needs_permission,
    )


def schema_of(name: str, parameters: Mapping[str, Any]) -> tuple[type[Struct], dict[str, Any]]:
    """Types by name, as one type and as a JSON schema. Raises ConfigError."""
    try:
        kind = msgspec.defstruct(_ARGUMENTS, list(parameters.items()), kw_only=True, forbid_unknown_fields=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tool {name!r} cannot be described: {error}") from None
    return kind, _schema(kind, name)


def _caller(function: Callable[..., Any], kind: type[Struct]) -> Callable[[Mapping[str, Any]], Any]:
    def convert(arguments: Mapping[str, Any]) -> dict[str, Any]:
        made = msgspec.convert(dict(arguments), kind)
        return {name: getattr(made, name) for name in kind.__struct_fields__}

    async def call_async(arguments: Mapping[str, Any]) -> Any:
        return await function(**convert(arguments))

    def call(arguments: Mapping[str, Any]) -> Any:
        return function(**convert(arguments))

    return call_async if inspect.iscoroutinefunction(function) else call


def _struct(function: Callable[..., Any], name: str, meanings: dict[str, str]) -> type[Struct]:
    """Its parameters as one type. Raises ConfigError."""
    try:
        signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise ConfigError(f"tool {name!r} cannot be described: {error}") from None
    fields: list[tuple[str, Any, Any]] = []
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"tool {name!r} takes {parameter}; models name each argument, so name each parameter")
        if parameter.name not in hints:
            raise ConfigError(f"tool {name!r} has no type hint for {parameter.name!r}; models are told the types")
        hint = hints[parameter.name]
        if (meaning := meanings.get(parameter.name)) and not _described(hint):
            hint = Annotated[hint, msgspec.Meta(description=meaning)]
        fields.append((parameter.name, hint, _default(parameter)))
    try:
        return msgspec.defstruct(_ARGUMENTS, fields, kw_only=True, forbid_unknown_fields=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tool {name!r} cannot be described: {error}") from None


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.default is parameter.empty:
        return NODEFAULT
    value = parameter.default
    if isinstance(value, list | dict | set):
        return msgspec.field(default_factory=lambda: type(value)(value))
    return value


def _described(hint: Any) -> bool:
    return get_origin(hint) is Annotated and any(getattr(m, "description", None) for m in get_args(hint)[1:])


def _schema(kind: type[Struct], name: str) -> dict[str, Any]:
    try:
        (_,), parts = msgspec.json.schema_components((kind,), ref_template="#/$defs/{name}")
    except TypeError as error:
        raise ConfigError(f"tool {name!r} cannot be described: {error}") from None
    schema: dict[str, Any] = parts.pop(_ARGUMENTS)
    schema.pop("title", None)
    schema.setdefault("properties", {})
    if not schema.get("required"):
        schema.pop("required", None)
    if parts:
        schema["$defs"] = parts
    return schema


# -- docstrings --------------------------------------------------------------------------------------------------------

_GOOGLE = re.compile(r"^(?:Args|Arguments|Parameters):\s*$", re.MULTILINE)
_NUMPY = re.compile(r"^Parameters\n-{3,}\s*$", re.MULTILINE)
_SPHINX = re.compile(r"^:(?:param|parameter|arg|argument)\s+(?:[^:\n]*\s)?(\w+):[ \t]*", re.MULTILINE)
_OTHER = re.compile(r"^(?:Returns?|Yields?|Raises|Examples?|Notes?):\s*$|^\w+\n-{3,}\s*$|^:\w+", re.MULTILINE)


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """What it says of the function, and of each parameter."""
    begins = [found for pattern in (_GOOGLE, _NUMPY) if (found := pattern.search(text))]
    meanings: dict[str, str] = {}
    if begins:
        block = text[begins[0].end() :]
        if ends := _OTHER.search(block):
            block = block[: ends.start()]
        meanings = _entries(block)
    for found in _SPHINX.finditer(text):
        rest = text[found.end() :]
        ends = re.search(r"\n(?=:|\S|\n)", rest)
        meanings[found[1]] = _one_line(rest[: ends.start()] if ends else rest)
    others = _OTHER.search(text)
    end = min([*(found.start() for found in begins), others.start() if others else len(text)])
    return text[:end].strip(), meanings


def _entries(block: str) -> dict[str, str]:
    """`name (type): text`, or `name : type` with the text below it; what is indented further goes on with it."""
    lines = [line for line in block.splitlines() if line.strip()]
    if not lines:
        return {}
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    entries: dict[str, list[str]] = {}
    last: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) > margin:
            last.append(line)
        elif found := re.match(r"\s*\*{0,2}(\w+)\s*(\([^)]*\))?\s*(:?)(.*)", line):
            below = margin == 0 or not found[3]  # numpy's: the type is on this line, the text is below
            last = entries[found[1]] = [] if below else [found[4]]
    return {name: _one_line(" ".join(text)) for name, text in entries.items() if text}


def _one_line(text: str) -> str:
    return " ".join(text.split())


# -- what models are told ----------------------------------------------------------------------------------------------

_SPECIAL = re.compile(r"<(?=[^<>\s]{1,64}>)|\[(?=/?[A-Z_]{2,40}\])")  # as all special tokens in use begin


def is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def defused(text: str) -> str:
    """`text` in which nothing looks like a special token any more: a space parts its bracket from its name."""
    return _SPECIAL.sub(lambda found: found[0] + " ", text)


def all_defused(value: Any) -> Any:
    """The same of every text in a JSON value, keys too."""
    if isinstance(value, dict):
        return {defused(key): all_defused(item) for key, item in value.items()}
    if isinstance(value, list):
        return [all_defused(item) for item in value]
    return defused(value) if isinstance(value, str) else value


def definition(tool: Tool) -> dict[str, Any]:
    """The tool as chat templates want it: OpenAI's function definition. Descriptions are defused; raises ConfigError
    for a name, a key or a value in the schema that could be a special token, for those cannot be changed."""
    parameters = _plain(tool.parameters, tool.name, "")
    function = {"name": tool.name, "description": defused(tool.description), "parameters": parameters}
    if not is_name(tool.name):
        raise ConfigError(f"a tool is named {tool.name!r}; it must be 1 to 64 letters, digits, _ or -")
    return {"type": "function", "function": function}


def _plain(value: Any, tool: str, key: str) -> Any:
    if isinstance(value, Mapping):
        return {_kept(str(name), tool): _plain(item, tool, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, tool, "") for item in value]
    if isinstance(value, str):
        return defused(value) if key in ("description", "title") else _kept(value, tool)
    return value


def _kept(text: str, tool: str) -> str:
    if defused(text) != text:
        raise ConfigError(f"the parameters of tool {tool!r} have {text[:80]!r}, which could be a special token")
    return text
