"""Two tools that are safe anywhere: a calculator, and what time it is."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

from llm_os.plugins.tools.schema import make_tool

_LONGEST = 500  # characters of an expression
_BITS = 4096  # of an integer on the way

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "round": lambda number, digits=None: _round(number, digits),
    "min": min,
    "max": max,
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "floor": math.floor,
    "ceil": math.ceil,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}


def calculate(expression: str) -> str:
    """Compute an arithmetic expression, such as "2 * (3 + 4) ** 2" or "sqrt(2)".

    Args:
        expression: numbers, + - * / // % **, brackets, pi, e, abs, round, min, max, sqrt, log, exp, sin, cos, tan,
            floor and ceil
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"the expression has {len(expression)} characters; the limit is {_LONGEST}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("it is no arithmetic expression") from None
    return str(_value(tree.body))


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(number)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            one, other = _value(left), _value(right)
            if isinstance(op, ast.Pow):
                _check_power(one, other)
            return _bounded(_BINARY[type(op)](one, other))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _bounded(_FUNCTIONS[name](*(_value(argument) for argument in arguments)))
    raise ValueError(f"there is no {type(node).__name__} in arithmetic")


def _round(number: Any, digits: Any) -> Any:
    """10 ** -digits is computed in one go, while nobody else can run: so digits are few."""
    return round(number) if digits is None else round(number, max(-400, min(400, digits)))


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _BITS:
        raise ValueError(f"a number has more than {_BITS} bits")


def _bounded(number: Any) -> Any:
    if isinstance(number, complex):
        raise ValueError("the result is no real number")
    if isinstance(number, int) and number.bit_length() > _BITS:
        raise ValueError(f"a number has more than {_BITS} bits")
    return number


def current_time(timezone: str = "UTC") -> str:
    """What date and time it is now.

    Args:
        timezone: a name of the IANA database, such as "Europe/Berlin"
    """
    try:
        zone = UTC if timezone == "UTC" else ZoneInfo(timezone)
    except (ValueError, OSError, KeyError):
        raise ValueError(f"there is no time zone {timezone!r}") from None
    return datetime.now(zone).isoformat(timespec="seconds")


CALCULATOR = make_tool(calculate, name="calculator", needs_permission=False, timeout_s=5.0, output_limit=2000)
CLOCK = make_tool(current_time, needs_permission=False, timeout_s=5.0)
