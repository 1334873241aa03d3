"""A small language for machine code: LLVM's instructions with Python's operators. Knows no model and no tensors.

    Function   one function that is being written: loops, branches, memory, vectors
    Value      a number, a vector or an address in it; `a * b + c` emits the instructions

A width of vector is what the writer asks for; LLVM makes two or four instructions of it where the processor has
shorter ones. Nothing may reorder sums: LLVM keeps floating-point operations in the order they are written in, so a
result depends on what is computed, never on how it was optimised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
PTR = ir.PointerType()
LANES = 16  # numbers of 32 bits in a vector


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


class Value:
    """A value of a Function. Operators need both sides of one type; Python numbers become constants of it."""

    __slots__ = ("function", "raw")

    def __init__(self, function: Function, raw: ir.Value) -> None:
        self.function = function
        self.raw = raw

    @property
    def type(self) -> ir.Type:
        return self.raw.type

    @property
    def floats(self) -> bool:
        return isinstance(getattr(self.type, "element", self.type), (ir.FloatType, ir.HalfType))

    def _binary(self, other: Any, integer: str, floating: str) -> Value:
        build = self.function.builder
        name = floating if self.floats else integer
        return Value(self.function, getattr(build, name)(self.raw, self.function.like(other, self).raw))

    def __add__(self, other: Any) -> Value:
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Any) -> Value:
        return self._binary(other, "sub", "fsub")

    def __mul__(self, other: Any) -> Value:
        return self._binary(other, "mul", "fmul")

    def __truediv__(self, other: Any) -> Value:
        return self._binary(other, "", "fdiv")

    def __floordiv__(self, other: Any) -> Value:
        return self._binary(other, "sdiv", "")

    def __mod__(self, other: Any) -> Value:
        return self._binary(other, "srem", "")

    def __and__(self, other: Any) -> Value:
        return self._binary(other, "and_", "")

    def __lshift__(self, other: Any) -> Value:
        return self._binary(other, "shl", "")

    def __rshift__(self, other: Any) -> Value:
        """Fills with zeros."""
        return self._binary(other, "lshr", "")

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> Value:
        return self.function.like(other, self) - self

    def __rtruediv__(self, other: Any) -> Value:
        return self.function.like(other, self) / self

    def shifted(self, places: int) -> Value:
        """To the right, keeping the sign."""
        return self._binary(places, "ashr", "")

    def _compared(self, how: str, other: Any) -> Value:
        build, right = self.function.builder, self.function.like(other, self).raw
        compare = build.fcmp_ordered if self.floats else build.icmp_signed
        return Value(self.function, compare(how, self.raw, right))

    def __lt__(self, other: Any) -> Value:
        return self._compared("<", other)

    def __le__(self, other: Any) -> Value:
        return self._compared("<=", other)

    def __gt__(self, other: Any) -> Value:
        return self._compared(">", other)

    def __ge__(self, other: Any) -> Value:
        return self._compared(">=", other)

    def within(self, count: Value) -> Value:
        """Whether it is an index of `count` things."""
        build = self.function.builder
        return Value(self.function, build.icmp_unsigned("<", self.raw, count.raw))

    def equals(self, other: Any) -> Value:
        return self._compared("==", other)

    def differs(self, other: Any) -> Value:
        """Also where a number is NaN."""
        if not self.floats:
            return self._compared("!=", other)
        raw = self.function.builder.fcmp_unordered("!=", self.raw, self.function.like(other, self).raw)
        return Value(self.function, raw)

    def to(self, target: ir.Type) -> Value:
        """The same number in another type; a vector's lanes each. Floats become integers by truncation."""
        build, source = self.function.builder, self.type
        a, b = getattr(source, "element", source), getattr(target, "element", target)
        a_float, b_float = (isinstance(t, (ir.FloatType, ir.HalfType)) for t in (a, b))
        if a == b:
            return self
        if a_float and b_float:
            make = build.fpext if b == F32 else build.fptrunc
        elif a_float:
            make = build.fptosi
        elif b_float:
            make = build.sitofp
        else:
            make = build.sext if b.width > a.width else build.trunc
        return Value(self.function, make(self.raw, target))

    def bits(self, target: ir.Type) -> Value:
        """The same bits as another type of the same size."""
        return Value(self.function, self.function.builder.bitcast(self.raw, target))

    def spread(self, lanes: int = LANES) -> Value:
        """A vector with this number in every lane."""
        build, target = self.function.builder, vector(self.type, lanes)
        one = build.insert_element(ir.Constant(target, ir.Undefined), self.raw, I32(0))
        mask = ir.Constant(vector(I32, lanes), [0] * lanes)
        return Value(self.function, build.shuffle_vector(one, ir.Constant(target, ir.Undefined), mask))

    def lane(self, index: int) -> Value:
        return Value(self.function, self.function.builder.extract_element(self.raw, I32(index)))

    def where(self, yes: Any, no: Any) -> Value:
        """`yes` in lanes where this is true, else `no`."""
        shape = yes if isinstance(yes, Value) else no
        left, right = self.function.like(yes, shape).raw, self.function.like(no, shape).raw
        return Value(self.function, self.function.builder.select(self.raw, left, right))

    # -- addresses ---------------------------------------------------------------------------------------------------

    def at(self, offset: Any, size: int = 1) -> Value:
        """This address, `offset` things of `size` bytes further."""
        moved = self.function.like(offset, self.function.zero) * size
        return Value(self.function, self.function.builder.gep(self.raw, [moved.raw], source_etype=I8))

    def field(self, index: Any, kind: ir.Type) -> Value:
        """What the record at this address has in its 64-bit field `index`."""
        return self.at(index, 8).load(kind)

    def load(self, kind: ir.Type) -> Value:
        lanes = getattr(kind, "element", kind)
        step = 8 if lanes == PTR else getattr(lanes, "width", 32 if lanes == F32 else 16) // 8
        return Value(self.function, self.function.builder.load(self.raw, typ=kind, align=step))

    def store(self, value: Value) -> None:
        lanes = getattr(value.type, "element", value.type)
        step = getattr(lanes, "width", 32 if lanes == F32 else 16) // 8
        self.function.builder.store(value.raw, self.raw, align=step)


class Variable:
    """A value that loops change. LLVM keeps it in a register."""

    def __init__(self, value: Value) -> None:
        function = value.function
        with function.builder.goto_entry_block():
            self._slot = function.builder.alloca(value.type)
        self._function, self._type = function, value.type
        self.set(value)

    def get(self) -> Value:
        return Value(self._function, self._function.builder.load(self._slot, typ=self._type))

    def set(self, value: Value) -> None:
        self._function.builder.store(value.raw, self._slot)


class Function:
    """A function that is being written."""

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[ir.Type], inner: bool = True) -> None:
        """It returns nothing. Only one that is not `inner` can be called from outside."""
        self.raw = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        if inner:
            self.raw.linkage = "internal"
        self.module = module
        self.builder = ir.IRBuilder(self.raw.append_basic_block("entry"))
        self.arguments = [Value(self, argument) for argument in self.raw.args]
        self.zero = Value(self, I64(0))

    def constant(self, number: float, kind: ir.Type) -> Value:
        if isinstance(kind, ir.VectorType):
            return Value(self, ir.Constant(kind, [number] * kind.count))
        return Value(self, ir.Constant(kind, number))

    def like(self, number: Any, shape: Value) -> Value:
        """`number` as a value of the type of `shape`, unless it is a value already."""
        return number if isinstance(number, Value) else self.constant(number, shape.type)

    def lanes(self) -> Value:
        """0, 1, 2, ..., in a vector."""
        return Value(self, ir.Constant(vector(I32), list(range(LANES))))

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1) -> Iterator[Value]:
        """`for index in range(start, stop, step)`, 64-bit integers."""
        index = Variable(self.like(start, self.zero))
        head, body, after = (self.raw.append_basic_block(name) for name in ("head", "body", "after"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch((index.get() < self.like(stop, self.zero)).raw, body, after)
        self.builder.position_at_end(body)
        yield index.get()
        index.set(index.get() + step)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def forever(self) -> Iterator[Callable[[Value], None]]:
        """A loop that ends where what is given, called with a condition, finds it true."""
        body, after = self.raw.append_basic_block("again"), self.raw.append_basic_block("after")
        self.builder.branch(body)
        self.builder.position_at_end(body)

        def leave_if(condition: Value) -> None:
            further = self.raw.append_basic_block("further")
            self.builder.cbranch(condition.raw, after, further)
            self.builder.position_at_end(further)

        yield leave_if
        self.builder.branch(body)
        self.builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.raw):
            yield

    def end(self) -> None:
        self.builder.ret_void()

    def call(self, function: ir.Function, *arguments: Value) -> Value:
        return Value(self, self.builder.call(function, [argument.raw for argument in arguments]))

    def intrinsic(self, name: str, *arguments: Value) -> Value:
        """LLVM's own function `name`, of the type of its first argument."""
        kind = ir.FunctionType(arguments[0].type, [argument.type for argument in arguments])
        declared = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        return self.call(declared, *arguments)

    def instruction(self, name: str, *arguments: Value) -> None:
        """LLVM's own function `name`, for its effect."""
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        declared = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        self.builder.call(declared, [argument.raw for argument in arguments])

    def local(self, size: int) -> Value:
        """The address of `size` bytes that are this call's."""
        with self.builder.goto_entry_block():
            slot = self.builder.alloca(ir.ArrayType(I8, size))
            slot.align = 64
        start = self.builder.gep(slot, [I64(0)], source_etype=I8)
        start.type = PTR  # llvmlite keeps the array's type, LLVM has one type of address
        return Value(self, start)

    # -- arithmetic --------------------------------------------------------------------------------------------------

    def prefetch(self, address: Value) -> None:
        """Bring what lies there into the second cache. It need not be anything."""
        self.instruction("llvm.prefetch.p0", address, *(Value(self, I32(number)) for number in (0, 2, 1)))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self.intrinsic(f"llvm.fma.{_suffix(a.type)}", a, b, c)

    def maximum(self, a: Value, b: Value) -> Value:
        return (a > b).where(a, b)

    def minimum(self, a: Value, b: Value | int) -> Value:
        return (a < b).where(a, b)

    def rounded(self, a: Value) -> Value:
        """To the nearest whole number, ties to the even one."""
        return self.intrinsic(f"llvm.rint.{_suffix(a.type)}", a)

    def root(self, a: Value) -> Value:
        return self.intrinsic(f"llvm.sqrt.{_suffix(a.type)}", a)

    def total(self, a: Value) -> Value:
        """The sum of a vector's lanes, halves first: the order is always the same."""
        return self._halves(a, lambda x, y: x + y)

    def least(self, a: Value) -> Value:
        return self._halves(a, self.minimum)

    def largest(self, a: Value) -> Value:
        return self._halves(a, self.maximum)

    def _halves(self, a: Value, combine: Callable[[Value, Value], Value]) -> Value:
        count: int = a.type.count
        while count > 1:
            count //= 2
            a = combine(self.picked(a, range(count)), self.picked(a, range(count, 2 * count)))
        return a.lane(0)

    def picked(self, a: Value, lanes: Sequence[int]) -> Value:
        mask = ir.Constant(vector(I32, len(lanes)), list(lanes))
        return Value(self, self.builder.shuffle_vector(a.raw, a.raw, mask))

    def joined(self, a: Value, b: Value) -> Value:
        mask = ir.Constant(vector(I32, 2 * a.type.count), list(range(2 * a.type.count)))
        return Value(self, self.builder.shuffle_vector(a.raw, b.raw, mask))


def _suffix(kind: ir.Type) -> str:
    element = getattr(kind, "element", kind)
    name = {F32: "f32", F16: "f16"}.get(element) or f"i{element.width}"
    return f"v{kind.count}{name}" if isinstance(kind, ir.VectorType) else name
