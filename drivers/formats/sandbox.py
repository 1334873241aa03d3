"""A jinja environment for templates by strangers: they can compute, and nothing else, for a counted number of steps.

The count is what bounds time, in any thread and without signals: every loop turn, call, filter, test and operator is
charged, each by the size of what it reads and writes, before it runs where the result can be larger than its parts.
What one unit buys (64 characters, one list entry) also bounds memory. Knows nothing of chats or models.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sized
from types import CodeType
from typing import Any, NoReturn

from jinja2 import Environment, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from llm_os.drivers.formats.budget import CHARACTERS, Budget, Spent, breadth

MAX_DEPTH = 64  # nested calls of macros, blocks and recursive loops
MAX_RANGE = 100_000
MAX_BITS = 4096  # of an integer
MAX_ATTRIBUTE = 256  # characters of a path such as "function.name" that a filter follows for each item
NODES = 8  # of a template's syntax tree that one unit pays for, each time that a loop or macro runs through them
FILENAME = "<chat template>"  # of compiled code, to find its lines in a traceback


_STRING_METHODS = frozenset(
    """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace
    istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip
    split splitlines startswith strip swapcase title upper""".split()  # noqa: SIM905
)
_DICT_METHODS = frozenset({"get", "items", "keys", "values"})
_OBJECTS = (Namespace, LoopContext, Macro, Cycler, Joiner, TemplateReference, BlockReference)

_FILTERS = frozenset(
    """abs capitalize count d default dictsort e escape first float groupby indent int items join last length list lower
    map max min reject rejectattr replace reverse safe select selectattr sort string title trim truncate unique
    upper""".split()  # noqa: SIM905
)
_LOOK_FILTERS = frozenset(  # whose work does not grow with what they are given, or is paid item by item later
    """count d default first items last length map reject rejectattr select selectattr""".split()  # noqa: SIM905
)
_SHALLOW_FILTERS = frozenset({"abs", "float", "int", "list", "reverse", "safe"})
_LOOK_TESTS = frozenset(
    """boolean callable defined escaped false float integer iterable mapping none number sameas sequence string true
    undefined""".split()  # noqa: SIM905
)
_NUMBER_TESTS = frozenset({"divisibleby", "even", "odd"})  # for a string, "%" would format
_ATTRIBUTE_FILTERS = frozenset(
    """groupby join map max min rejectattr selectattr sort unique""".split()  # noqa: SIM905
)
_WIDE_FORMAT = re.compile(r"%\(|%[^a-zA-Z%]*(?:\*|\d{4})")
_INTERNAL = (Context, Environment, nodes.EvalContext)

# Filters of our own; no template can write a name with a space.
_TICK, _CONCAT, _DEEP, _BROAD = "budget tick", "budget concat", "budget deep", "budget broad"


def _is_lazy(value: Any) -> bool:
    return isinstance(value, Iterator) and not isinstance(value, LoopContext)


class _Names(Namespace):
    """jinja's namespace without names that Python gives a meaning, and without printing what is in it."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot have {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part of a template for training; rendering shows its body."""

    tags = {"generation"}  # jinja's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Sandbox(ImmutableSandboxedEnvironment):
    """One rendering, or one compilation, within one budget. Not for two threads at once."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, budget: Budget) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self._printed,
            optimized=False,
        )
        self.budget = budget
        self._depth = 0
        self.filters = {name: self._filter(name, self.filters[name]) for name in _FILTERS}
        self.filters["tojson"] = self._filter("tojson", _tojson)
        self.filters |= {_TICK: self._tick, _CONCAT: self._concat, _DEEP: self._deep, _BROAD: self._broad}
        self.tests = {name: self._test(name, test) for name, test in self.tests.items()}
        self.globals = {"range": self._range, "dict": dict, "namespace": _Names, "cycler": Cycler, "joiner": Joiner}

    def compile_template(self, source: str) -> CodeType:
        """The code of a template, charges built in. Raises jinja2.TemplateSyntaxError, and what Python raises."""
        return self.compile(Charges().visit(self.parse(source)), filename=FILENAME)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        if isinstance(obj, dict):
            return attr in _DICT_METHODS
        return isinstance(obj, _OBJECTS) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No: a format string can ask for any width, so `format` is no safe attribute either."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it may not use {attribute!r} of a {type(obj).__name__}")

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            self.budget.spend_deep(argument)  # to hash it
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        spend = self.budget.spend
        spend(breadth(left) + breadth(right))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if operator in ("*", "**") and bits > MAX_BITS:
                raise Spent(f"an integer would have more than {MAX_BITS} bits")
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    spend(breadth(text) * max(times, 0))
        elif operator == "%" and isinstance(left, str):
            if _WIDE_FORMAT.search(left):
                raise Spent("a format is wider than 999 characters, or names what it formats")
            spend(left.count("%") * 1000 // CHARACTERS)
            self.budget.spend_deep(right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise Spent(f"an integer has more than {MAX_BITS} bits")
        return result

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.spend(1 + len(args) + len(kwargs))
        if not isinstance(function, Macro):
            args = tuple(self._solid(arg) for arg in args)
            self.budget.spend_deep(*args, *kwargs.values())
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self.budget.spend(breadth(owner))
            self._guard(function.__name__, owner, *args, **kwargs)
        if self._depth == MAX_DEPTH:
            raise Spent(f"calls are nested more than {MAX_DEPTH} deep")
        self._depth += 1
        try:
            result = super().call(context, function, *args, **kwargs)
        finally:
            self._depth -= 1
        self.budget.spend(breadth(result))
        return result

    def _filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        budget, look, shallow = self.budget, name in _LOOK_FILTERS, name in _SHALLOW_FILTERS

        @functools.wraps(function)  # carries jinja's mark of filters that want the context
        def charged(*args: Any, **kwargs: Any) -> Any:
            args = tuple(self._solid(arg) for arg in args)
            values = [arg for arg in args if not isinstance(arg, _INTERNAL)]
            if look:
                budget.spend(1 + len(args) + len(kwargs))
            elif shallow:
                budget.spend(1 + sum(map(breadth, values)))
            else:
                budget.spend_deep(*values, *kwargs.values())
            self._guard(name, *values, **kwargs)
            result = function(*args, **kwargs)
            if _is_lazy(result):
                return budget.each(result)
            budget.spend(breadth(result))
            return result

        return charged

    def _test(self, name: str, function: Any) -> Callable[..., Any]:
        @functools.wraps(function)
        def charged(value: Any, *args: Any) -> Any:
            self.budget.spend(1)
            if name in _NUMBER_TESTS and not isinstance(value, (int, float)):
                raise TypeError(f"{name} is a test for numbers")
            if name not in _LOOK_TESTS:
                value, args = self._solid(value), tuple(self._solid(arg) for arg in args)
                self.budget.spend_deep(value, *args)
            return function(value, *args)

        return charged

    def _guard(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Pay beforehand for a string method or filter whose result, or time, is a product of what it is given."""
        more = [*args, *kwargs.values()]
        product = 0
        if name in _ATTRIBUTE_FILTERS:
            paths = [*(args[:1] if name.endswith("attr") else args[name == "join" :]), kwargs.get("attribute")]
            if any(isinstance(path, str) and len(path) > MAX_ATTRIBUTE for path in paths):
                raise Spent(f"{name} follows a path of more than {MAX_ATTRIBUTE} characters")
        if name == "join":
            pieces = [part for part in (value, *more) if not isinstance(part, str) and isinstance(part, Sized)]
            glue = [part for part in (value, *more) if isinstance(part, str)]
            product = sum(map(len, glue)) * sum(map(len, pieces))
        elif name == "replace" and len(more) >= 2:
            text, old, new = str(value), str(more[0]), str(more[1])
            product = (text.count(old) if old else len(text) + 1) * len(new)
        elif name == "indent":
            wide = [int(part) if isinstance(part, int) else len(str(part)) for part in more]
            product = (str(value).count("\n") + 1) * max([4, *wide])
        elif name in ("strip", "lstrip", "rstrip", "trim") and more:
            product = len(str(value)) * len(str(more[0]))
        elif name == "tojson":
            indent = kwargs.get("indent", args[1] if len(args) > 1 else None) or 0
            if len(str(indent)) > 2 or any(len(str(part)) > 40 for part in more):
                raise Spent("tojson's indent or separators are too wide")
        self.budget.spend(product // CHARACTERS)

    def _solid(self, value: Any) -> Any:
        return list(self.budget.each(value)) if _is_lazy(value) else value

    def _printed(self, value: Any) -> Any:
        self.budget.spend_deep(value)
        return value

    def _tick(self, units: int) -> bool:
        self.budget.spend(units)
        return True

    def _concat(self, values: list[Any]) -> str:
        self.budget.spend_deep(*values)
        return "".join(map(str, values))

    def _deep(self, value: Any) -> Any:
        value = self._solid(value)
        self.budget.spend_deep(value)
        return value

    def _broad(self, value: Any) -> Any:
        self.budget.spend(breadth(value))
        return value

    def _range(self, *args: int) -> range:
        values = range(*args)
        if len(values) > MAX_RANGE:
            raise Spent(f"a range has {len(values)} numbers; the limit is {MAX_RANGE}")
        return values


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: keys in their order, and no escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Charges(NodeTransformer):
    """Builds the charges into a template that no method of the environment sees: loops, comparisons, concatenations."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        turn = _units(node.test) if node.test is not None else 0
        self._tick_body(node)
        if node.test is not None:
            node.test = nodes.And(_own(_TICK, nodes.Const(turn), node), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self._tick_body(node)
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        self._tick_body(node)
        return node

    def visit_Block(self, node: nodes.Block) -> nodes.Block:
        self._tick_body(node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _own(_DEEP, node.key, node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _own(_CONCAT, nodes.List(node.nodes, lineno=node.lineno), node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        contains = any(operand.op in ("in", "notin") for operand in node.ops)
        if contains or not any(isinstance(operand, nodes.Const) for operand in operands):
            # Otherwise one side is a constant: a comparison does not look further than the shorter side.
            node.expr = _own(_DEEP, node.expr, node)
            for operand in node.ops:
                operand.expr = _own(_DEEP, operand.expr, node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _own(_BROAD, node.node, node)
        return node

    def _tick_body(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> None:
        units = sum(map(_units, node.body))
        self.generic_visit(node)
        tick = _own(_TICK, nodes.Const(1 + units), node)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))


def _own(name: str, argument: nodes.Expr, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(argument, name, [], [], None, None, lineno=at.lineno)


def _units(node: nodes.Node) -> int:
    """For running through a piece of template once: what it evaluates, and what it writes without an expression."""
    count, text = 1, 0
    for inner in (node, *node.find_all(nodes.Node)):
        count += 1
        if isinstance(inner, nodes.TemplateData):
            text += len(inner.data)
        elif isinstance(inner, nodes.Const) and isinstance(inner.value, str):
            text += len(inner.value)
    return 1 + count // NODES + text // CHARACTERS
