"""What a tool is: a name, a schema, and something to call. Runs nothing; `plugins/tools/` does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from msgspec import Struct


class Tool(Struct, frozen=True, kw_only=True):
    """A function that a model may ask for.

    `call(arguments)` gets arguments that have been checked against `parameters` and permitted by a person or a rule. It
    may be a plain function (called in a worker thread) or a coroutine function. It returns text, or what msgspec can
    write as JSON. What it raises is told to the model.
    """

    name: str  # [a-zA-Z0-9_-]{1,64}
    description: str
    parameters: dict[str, Any]  # a JSON schema of type "object"
    call: Callable[[Mapping[str, Any]], Any | Awaitable[Any]]
    argument_class: Callable[[Mapping[str, Any]], str] | None = None  # what is asked for, as permissions see it
    # ("read:/etc", "host:example.com"); None: every call of the tool is alike
    timeout_s: float = 30.0
    output_limit: int = 65536  # characters; more is cut off, and the model is told so
    expected_s: float | None = None  # how long it usually takes: what the kernel does with the KV meanwhile
    needs_permission: bool = True  # False: it has no effect and shows nothing that the asker may not see
