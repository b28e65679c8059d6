"""The activations that kernels fuse, sixteen lanes at a time: their values and their slopes."""

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from .arguments import INVERTED_LEAKY_RELU
from .vectors import LANES, Arguments, call_llvm, constant, suffix, vector


def _sigmoid(builder: ir.IRBuilder, element: str, z: ir.Value) -> ir.Value:
    one = constant(element, 1.0)
    negative = builder.fsub(constant(element, -0.0), z)
    return builder.fdiv(one, builder.fadd(one, _exponential(builder, element, negative)))


def _exponential(builder: ir.IRBuilder, element: str, x: ir.Value) -> ir.Value:
    """Exp of sixteen lanes: 2^k times a polynomial in the rest, within 2 ulp; exact limits at both ends."""
    kind = vector(element)
    double_precision = element == "float64"
    bits, bias = (ir.IntType(64), 1023) if double_precision else (ir.IntType(32), 127)
    mantissa = 52 if double_precision else 23
    lowest, highest = (-708.0, 709.0) if double_precision else (-87.0, 88.0)
    integers = ir.VectorType(bits, LANES)
    low, high = constant(element, lowest), constant(element, highest)
    # A NaN fails both comparisons and travels through the polynomial.
    bounded = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    bounded = builder.select(builder.fcmp_ordered(">", bounded, high), high, bounded)
    scaled = builder.fmul(bounded, constant(element, 1.4426950408889634))
    whole = call_llvm(builder, f"llvm.rint.{suffix(kind)}", kind, [scaled])
    # log 2 in two parts, the first exact in few bits, so that the remainder keeps its digits.
    parts = (0.693145751953125, 1.42860682030941723212e-6)
    rest = bounded
    for part in parts:
        rest = call_llvm(builder, f"llvm.fma.{suffix(kind)}", kind, [whole, constant(element, -part), rest])
    terms = 13 if double_precision else 7
    factorial = [1.0]
    for n in range(1, terms + 1):
        factorial.append(factorial[-1] * n)
    result = constant(element, 1.0 / factorial[terms])
    for n in range(terms - 1, -1, -1):
        coefficient = constant(element, 1.0 / factorial[n])
        result = call_llvm(builder, f"llvm.fma.{suffix(kind)}", kind, [result, rest, coefficient])
    is_number = builder.fcmp_ordered("ord", x, x)
    power = builder.fptosi(builder.select(is_number, whole, constant(element, 0.0)), integers)
    shifted = builder.shl(
        builder.add(power, ir.Constant(integers, [bias] * LANES)), ir.Constant(integers, [mantissa] * LANES)
    )
    return builder.fmul(result, builder.bitcast(shifted, kind))


SLOPE = 0.01  # of leaky_relu below zero: torch's default


def _frozen(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return the same value, which LLVM must have before it is used; llvmlite writes no ``freeze`` by itself."""
    instruction = ir.instructions.Instruction(builder.block, value.type, "freeze", [value])
    builder._insert(instruction)
    return instruction


@intrinsic
def activate(_: Any, arguments: Arguments, z: Any) -> Any:
    """Apply the kernel's activation. A NaN stays one."""
    element, name = z.element, arguments.activation

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        value, zero = a[1], constant(element, 0.0)
        if name in ("relu", "relu6"):
            value = b.select(b.fcmp_ordered("<=", value, zero), zero, value)
        if name == "relu6":
            six = constant(element, 6.0)
            value = b.select(b.fcmp_ordered(">=", value, six), six, value)
        if name == "leaky_relu":
            value = b.select(b.fcmp_ordered("<", value, zero), b.fmul(value, constant(element, SLOPE)), value)
        if name == "silu":
            value = b.fmul(value, _sigmoid(b, element, value))
        return value

    return z(arguments, z), generate


@intrinsic
def gate(_: Any, arguments: Arguments, dy: Any, z: Any) -> Any:
    """Dy times the derivative of the activation at z; where the sign decides, z may be the output instead."""
    element, name = z.element, arguments.activation

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        gradient, value = a[1], a[2]
        zero = constant(element, 0.0)
        # As torch: where z is NaN the gradient of relu and relu6 passes, and that of leaky_relu gets the slope below.
        if name in ("relu", "relu6"):
            # Frozen, for LLVM would load dy under the mask, and so only once z is known: half as fast from far caches.
            gradient = b.select(b.fcmp_ordered("<=", value, zero), zero, _frozen(b, gradient))
        if name == "relu6":
            gradient = b.select(b.fcmp_ordered(">=", value, constant(element, 6.0)), zero, gradient)
        if name in ("leaky_relu", INVERTED_LEAKY_RELU):
            below = b.fcmp_unordered("<=", value, zero)
            gradient = b.select(below, b.fmul(gradient, constant(element, SLOPE)), gradient)
        if name == "silu":
            one, sigmoid = constant(element, 1.0), _sigmoid(b, element, value)
            slope = b.fmul(sigmoid, b.fadd(one, b.fmul(value, b.fsub(one, sigmoid))))
            gradient = b.fmul(gradient, slope)
        return gradient

    return z(arguments, z, z), generate


@intrinsic
def invert(_: Any, arguments: Arguments, y: Any) -> Any:
    """Return what stood before the activation, where the kernel finds the output in the place of the input."""
    element, inverted = y.element, arguments.activation == INVERTED_LEAKY_RELU

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        value = a[1]
        if inverted:
            below = b.fcmp_ordered("<", value, constant(element, 0.0))
            value = b.select(below, b.fmul(value, constant(element, 1 / SLOPE)), value)
        return value

    return y(arguments, y), generate
