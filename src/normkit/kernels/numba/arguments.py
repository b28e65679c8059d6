"""What a kernel reads of its arguments: slots as numbers and addresses, and what it is specialised for."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .vectors import BOOL, COMPUTED, DOUBLE, INT64, LANES, STORED, Address, Arguments

# What the backward calls leaky_relu where it finds the output in the place of the input.
INVERTED_LEAKY_RELU = "inverted_leaky_relu"


def _slot(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value) -> ir.Value:
    return builder.load(builder.gep(pointer, [index]))


@intrinsic
def integer(_: Any, arguments: Arguments, index: Any) -> Any:
    """Read slot ``index`` as an integer."""
    return types.int64(arguments, types.int64), lambda c, b, s, a: _slot(b, a[0], a[1])


@intrinsic
def real(_: Any, arguments: Arguments, index: Any) -> Any:
    """Read slot ``index`` as a float64."""
    return types.float64(arguments, types.int64), lambda c, b, s, a: b.bitcast(_slot(b, a[0], a[1]), DOUBLE)


def _address_reader(element_of: Callable[[Arguments], str]) -> Any:
    @intrinsic
    def read(_: Any, arguments: Arguments, index: Any) -> Any:
        kind = Address(element_of(arguments))

        def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
            return b.inttoptr(_slot(b, a[0], a[1]), STORED[kind.element].as_pointer())

        return kind(arguments, types.int64), generate

    return read


data = _address_reader(lambda arguments: arguments.element)  # a tensor of the element type
parameter = _address_reader(lambda arguments: COMPUTED[arguments.element])  # of the type computed in
double = _address_reader(lambda arguments: "float64")


@intrinsic
def plain(_: Any, arguments: Arguments) -> Any:
    """The same arguments for what no activation and no residual changes: it is compiled once for all of them."""
    kind = Arguments(arguments.element, None, False, arguments.revision)
    return kind(arguments), lambda c, b, s, a: a[0]


@intrinsic
def working_lanes(_: Any, arguments: Arguments, index: Any, skipped: Any) -> Any:
    """Read slot ``index`` as an address of numbers computed in, past ``skipped`` float64 numbers."""
    kind = Address(COMPUTED[arguments.element])

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        start = b.inttoptr(_slot(b, a[0], a[1]), DOUBLE.as_pointer())
        return b.bitcast(b.gep(start, [a[2]]), STORED[kind.element].as_pointer())

    return kind(arguments, types.int64, types.int64), generate


@intrinsic
def working_doubles(_: Any, arguments: Arguments, index: Any, skipped: Any) -> Any:
    """Read slot ``index`` as an address of float64 numbers, past ``skipped`` of them."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        return b.gep(b.inttoptr(_slot(b, a[0], a[1]), DOUBLE.as_pointer()), [a[2]])

    return Address("float64")(arguments, types.int64, types.int64), generate


@intrinsic
def is_null(_: Any, address: Address) -> Any:
    """Tell whether a pointer is null."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        return b.icmp_unsigned("==", b.ptrtoint(a[0], INT64), ir.Constant(INT64, 0))

    return types.boolean(address), generate


@intrinsic
def has_residual(_: Any, arguments: Arguments) -> Any:
    """Tell whether the kernel adds a residual."""
    value = ir.Constant(BOOL, int(arguments.residual))
    return types.boolean(arguments), lambda c, b, s, a: value


@intrinsic
def has_activation(_: Any, arguments: Arguments) -> Any:
    """Tell whether the kernel has an activation."""
    value = ir.Constant(BOOL, int(arguments.activation is not None))
    return types.boolean(arguments), lambda c, b, s, a: value


@intrinsic
def gates_by_output(_: Any, arguments: Arguments) -> Any:
    """Tell whether the sign of the output decides the gradient: no residual is read again, or nothing else is left."""
    by_sign = arguments.residual and arguments.activation in ("relu", "relu6", "leaky_relu")
    value = ir.Constant(BOOL, int(by_sign or arguments.activation == INVERTED_LEAKY_RELU))
    return types.boolean(arguments), lambda c, b, s, a: value


def _scratch(size: int, element_of: Callable[[Arguments], str]) -> Any:
    @intrinsic
    def allocate(_: Any, arguments: Arguments) -> Any:
        kind = Address(element_of(arguments))

        def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
            stored = STORED[kind.element]
            memory = cgutils.alloca_once(b, ir.ArrayType(stored, size))
            memory.align = 64
            return b.bitcast(memory, stored.as_pointer())

        return kind(arguments), generate

    return allocate


GROUP = 32  # the most channels that one task of a contiguous kernel takes at a time
scratch = _scratch(2 * LANES * GROUP, lambda arguments: COMPUTED[arguments.element])  # on the stack
scratch_centres = _scratch(GROUP, lambda arguments: COMPUTED[arguments.element])
scratch_double = _scratch(4 * GROUP, lambda arguments: "float64")
