"""Explicit vectors of sixteen lanes for Numba: speed and the order of additions do not hang on the auto-vectoriser.

A kernel is a Numba ``cfunc`` of ``(begin, end, arguments)``. `Arguments` is a Numba type that carries, beside the
pointer to 64-bit slots, what a kernel is specialised for: the element type of its tensors, an activation, whether a
residual is added. The intrinsics below read those at compile time, so that one source serves every combination, and
Numba's disk cache, which is keyed by signature, tells them apart.

Elements are widened as they are loaded and rounded once as they are stored: float16 and bfloat16 compute in float32.
LLVM lowers ``<16 x float>`` to one AVX-512 register, two of AVX2 or four of NEON with the same result in every bit.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from .pipeline import PartCompiler
from .processor import has_avx512

LANES = 16
# What a kernel calls is compiled once for its types, and inlined by LLVM: Numba's own inlining takes twice as long. It
# needs no entrance from Python. Dividing by zero gives infinity as in NumPy.
_SETTINGS: dict[str, Any] = {
    "pipeline_class": PartCompiler,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
inlined = njit(forceinline=True, **_SETTINGS)
called = njit(**_SETTINGS)
BOOL, _BYTE, _INT16, _INT32, INT64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_FLOAT, DOUBLE, _HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
# How an element lies in memory, and the type it is computed in.
STORED = {"float32": _FLOAT, "float64": DOUBLE, "bfloat16": _INT16, "float16": _HALF}
COMPUTED = {"float32": "float32", "float64": "float64", "bfloat16": "float32", "float16": "float32"}
_SCALAR = {"float32": types.float32, "float64": types.float64}


class Arguments(types.Type):
    """The pointer a kernel receives, and what the kernel is specialised for."""

    def __init__(self, element: str, activation: str | None, residual: bool, revision: str) -> None:
        self.element, self.activation, self.residual, self.revision = element, activation, residual, revision
        # The revision stands for the source of every kernel file: a changed source misses the disk cache.
        super().__init__(name=f"Arguments({element}, {activation}, {residual}, {revision})")


class Address(types.Type):
    """A pointer to elements of one type."""

    def __init__(self, element: str) -> None:
        self.element = element
        super().__init__(name=f"Address({element})")


class Lanes(types.Type):
    """Sixteen float32 or float64 numbers."""

    def __init__(self, element: str) -> None:
        self.element = element
        super().__init__(name=f"Lanes({element})")


class Mask(types.Type):
    """Sixteen truth values."""

    def __init__(self) -> None:
        super().__init__(name="Mask")


def vector(element: str) -> ir.VectorType:
    """Return the LLVM type of sixteen elements as they are stored."""
    return ir.VectorType(STORED[element], LANES)


@register_model(Arguments)
class _ArgumentsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Arguments) -> None:
        super().__init__(manager, kind, INT64.as_pointer())


@register_model(Address)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Address) -> None:
        super().__init__(manager, kind, STORED[kind.element].as_pointer())


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, vector(kind.element))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Mask) -> None:
        super().__init__(manager, kind, ir.VectorType(BOOL, LANES))


def _splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes))


def constant(element: str, value: float) -> ir.Constant:
    """Return sixteen copies of a constant."""
    return ir.Constant(vector(element), [value] * LANES)


def call_llvm(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    """Call one of LLVM's own functions."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def suffix(kind: ir.Type) -> str:
    """Return how LLVM writes a type in the names of its functions."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{suffix(kind.element)}"
    names = {_FLOAT: "f32", DOUBLE: "f64", _HALF: "f16", _INT16: "i16", _INT32: "i32"}
    return names[kind]


def _widen(builder: ir.IRBuilder, element: str, value: ir.Value) -> ir.Value:
    """Turn a loaded element, or a vector of them, into the type computed in."""
    if element == "float16":
        wide = ir.VectorType(_FLOAT, LANES) if isinstance(value.type, ir.VectorType) else _FLOAT
        return builder.fpext(value, wide)
    if element == "bfloat16":
        many = isinstance(value.type, ir.VectorType)
        integer_type, float_type = (
            (ir.VectorType(_INT32, LANES), ir.VectorType(_FLOAT, LANES)) if many else (_INT32, _FLOAT)
        )
        sixteen = ir.Constant(integer_type, [16] * LANES if many else 16)
        return builder.bitcast(builder.shl(builder.zext(value, integer_type), sixteen), float_type)
    return value


def _narrow(builder: ir.IRBuilder, element: str, value: ir.Value) -> ir.Value:
    """Round a computed number, or a vector of them, to the stored type: to nearest, ties to even."""
    many = isinstance(value.type, ir.VectorType)
    if element == "float16":
        return builder.fptrunc(value, ir.VectorType(_HALF, LANES) if many else _HALF)
    if element == "bfloat16":
        integer_type = ir.VectorType(_INT32, LANES) if many else _INT32
        short = ir.VectorType(_INT16, LANES) if many else _INT16

        def number(n: int) -> ir.Constant:
            return ir.Constant(integer_type, [n] * LANES if many else n)

        bits = builder.bitcast(value, integer_type)
        odd = builder.and_(builder.lshr(bits, number(16)), number(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, number(0x7FFF))), number(16))
        # Adding to the bits of a NaN could carry it into infinity.
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(is_nan, number(0x7FC0), rounded), short)
    return value


# What kernels are handed may begin at any byte, as torch.frombuffer allows; processors read and write there as quickly.
_ANYWHERE = 1


def _scalar_type(element: str) -> Any:
    return _SCALAR[COMPUTED[element]]


@intrinsic
def load(_: Any, address: Address, index: Any) -> Any:
    """Read one element."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        return _widen(b, address.element, b.load(b.gep(a[0], [a[1]]), align=_ANYWHERE))

    return _scalar_type(address.element)(address, types.int64), generate


@intrinsic
def store(_: Any, address: Address, index: Any, value: Any) -> Any:
    """Write one element."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        b.store(_narrow(b, address.element, a[2]), b.gep(a[0], [a[1]]), align=_ANYWHERE)
        return c.get_dummy_value()

    return types.void(address, types.int64, _scalar_type(address.element)), generate


def _vector_pointer(builder: ir.IRBuilder, element: str, address: ir.Value, index: ir.Value) -> ir.Value:
    return builder.bitcast(builder.gep(address, [index]), vector(element).as_pointer())


@intrinsic
def vload(_: Any, address: Address, index: Any) -> Any:
    """Read sixteen elements."""
    element = address.element

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        loaded = b.load(_vector_pointer(b, element, a[0], a[1]), align=_ANYWHERE)
        return _widen(b, element, loaded)

    return Lanes(COMPUTED[element])(address, types.int64), generate


def _store(streaming: bool) -> Any:
    @intrinsic
    def write(_: Any, address: Address, index: Any, value: Any) -> Any:
        element = address.element

        def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
            stored = b.store(_narrow(b, element, a[2]), _vector_pointer(b, element, a[0], a[1]))
            # A streaming store goes past the caches, and needs an address aligned to the whole vector.
            stored.align = LANES * STORED[element].get_abi_size(c.target_data) if streaming else _ANYWHERE
            if streaming:
                stored.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(_INT32, 1)]))
            return c.get_dummy_value()

        return types.void(address, types.int64, Lanes(COMPUTED[element])), generate

    return write


vstore, vstream = _store(streaming=False), _store(streaming=True)


def _first(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """The mask of the first ``count`` lanes."""
    lane_numbers = ir.Constant(ir.VectorType(_INT32, LANES), list(range(LANES)))
    return builder.icmp_signed("<", lane_numbers, _splat(builder, builder.trunc(count, _INT32)))


def _load_under(builder: ir.IRBuilder, kind: ir.VectorType, pointer: ir.Value, mask: ir.Value) -> ir.Value:
    """Read the lanes of a mask; what the others hold is not said."""
    arguments = [pointer, ir.Constant(_INT32, _ANYWHERE), mask, ir.Constant(kind, ir.Undefined)]
    return call_llvm(builder, f"llvm.masked.load.{suffix(kind)}.p0", kind, arguments)


def _load_pairs(builder: ir.IRBuilder, kind: ir.VectorType, pointer: ir.Value, count: ir.Value) -> ir.Value:
    """Read the first ``count`` of sixteen elements of two bytes, one at least: two at a time, and the odd one."""
    lanes = LANES // 2
    kind_of_pairs = ir.VectorType(_INT32, lanes)
    numbers = ir.Constant(kind_of_pairs, list(range(lanes)))
    pairs = _splat(builder, builder.trunc(builder.lshr(count, INT64(1)), _INT32), lanes)
    taken = builder.icmp_signed("<", numbers, pairs)
    read = _load_under(builder, kind_of_pairs, builder.bitcast(pointer, kind_of_pairs.as_pointer()), taken)
    last = builder.gep(builder.bitcast(pointer, _INT16.as_pointer()), [builder.sub(count, INT64(1))])
    odd = _splat(builder, builder.zext(builder.load(last, align=_ANYWHERE), _INT32), lanes)
    return builder.bitcast(builder.select(taken, read, odd), kind)


@intrinsic
def vload_first(_: Any, address: Address, index: Any, count: Any, rest: Any) -> Any:
    """Read the first ``count`` of sixteen elements; the other lanes, whose memory is not touched, hold ``rest``."""
    element = address.element
    computed = Lanes(COMPUTED[element])

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        pointer, mask, kind = _vector_pointer(b, element, a[0], a[1]), _first(b, a[2]), vector(element)
        in_pairs = STORED[element].get_abi_size(c.target_data) == 2 and not has_avx512()
        loaded = _load_pairs(b, kind, pointer, a[2]) if in_pairs else _load_under(b, kind, pointer, mask)
        return b.select(mask, _widen(b, element, loaded), a[3])

    return computed(address, types.int64, types.int64, computed), generate


def _store_pieces(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value, count: ir.Value) -> None:
    """Write the first ``count`` lanes: eight, four, two and one of them, where the bits of the count say so."""
    kind = value.type.element
    undefined = ir.Constant(value.type, ir.Undefined)
    whole = builder.icmp_signed(">=", count, ir.Constant(INT64, LANES))
    with builder.if_else(whole) as (all_of_them, some):
        with all_of_them:
            builder.store(value, pointer, align=_ANYWHERE)
        with some:
            at = builder.bitcast(pointer, kind.as_pointer())
            for width in (8, 4, 2, 1):
                numbers = [ir.Constant(ir.VectorType(_INT32, width), [*range(low, low + width)]) for low in (0, width)]
                low, high = (builder.shuffle_vector(value, undefined, lanes) for lanes in numbers)
                taken = builder.icmp_unsigned("!=", builder.and_(count, ir.Constant(INT64, width)), INT64(0))
                with builder.if_then(taken):
                    builder.store(low, builder.bitcast(at, low.type.as_pointer()), align=_ANYWHERE)
                at = builder.gep(at, [builder.select(taken, INT64(width), INT64(0))])
                value, undefined = builder.select(taken, high, low), ir.Constant(low.type, ir.Undefined)


@intrinsic
def vstore_first(_: Any, address: Address, index: Any, count: Any, value: Any) -> Any:
    """Write the first ``count`` of sixteen elements and touch no others."""
    element = address.element

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        pointer, stored, kind = _vector_pointer(b, element, a[0], a[1]), _narrow(b, element, a[3]), vector(element)
        if has_avx512():
            arguments = [stored, pointer, ir.Constant(_INT32, _ANYWHERE), _first(b, a[2])]
            call_llvm(b, f"llvm.masked.store.{suffix(kind)}.p0", ir.VoidType(), arguments)
        else:
            # AVX2 takes 42 steps for eight lanes under a mask on a Zen 3, and asks for each lane of half precision.
            _store_pieces(b, stored, pointer, a[2])
        return c.get_dummy_value()

    return types.void(address, types.int64, types.int64, Lanes(COMPUTED[element])), generate


@intrinsic
def fence(_: Any) -> Any:
    """Make streaming stores visible to other threads before what follows."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        b.fence("seq_cst")
        return c.get_dummy_value()

    return types.void(), generate


@intrinsic
def splat(_: Any, value: Any) -> Any:
    """Sixteen copies of one number."""
    element = "float64" if value == types.float64 else "float32"
    scalar: Any = _SCALAR[element]
    return Lanes(element)(scalar), lambda c, b, s, a: _splat(b, a[0])


def _binary(operation: Any, name: str) -> None:
    @intrinsic
    def combine(_: Any, x: Any, y: Any) -> Any:
        return x(x, x), lambda c, b, s, a: getattr(b, name)(a[0], a[1])

    @overload(operation)
    def resolve(x, y):
        if isinstance(x, Lanes) and x == y:
            return lambda x, y: combine(x, y)  # type: ignore[call-arg]  # Numba supplies the typing context
        return None


for _operation, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _binary(_operation, _name)


@intrinsic
def zeros(_: Any, arguments: Arguments) -> Any:
    """Sixteen zeros of the type computed in."""
    element = COMPUTED[arguments.element]
    return Lanes(element)(arguments), lambda c, b, s, a: constant(element, 0.0)


@intrinsic
def narrow(_: Any, arguments: Arguments, x: Any) -> Any:
    """Sixteen float64 numbers rounded to the type computed in."""
    element = COMPUTED[arguments.element]

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        return a[1] if element == "float64" else b.fptrunc(a[1], vector(element))

    return Lanes(element)(arguments, x), generate


@intrinsic
def fma(_: Any, x: Any, y: Any, z: Any) -> Any:
    """X * y + z, rounded once."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        kind = a[0].type
        return call_llvm(b, f"llvm.fma.{suffix(kind)}", kind, list(a))

    return x(x, x, x), generate


@intrinsic
def not_below_zero(_: Any, x: Any) -> Any:
    """X where it is above zero or NaN, and zero elsewhere."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        zero = constant(x.element, 0.0)
        return b.select(b.fcmp_ordered("<", a[0], zero), zero, a[0])

    return x(x), generate


@intrinsic
def lower(_: Any, x: Any, y: Any) -> Any:
    """X where it is below y, and y elsewhere."""
    return x(x, x), lambda c, b, s, a: b.select(b.fcmp_ordered("<", a[0], a[1]), a[0], a[1])


@intrinsic
def upper(_: Any, x: Any, y: Any) -> Any:
    """X where it is above y, and y elsewhere."""
    return x(x, x), lambda c, b, s, a: b.select(b.fcmp_ordered(">", a[0], a[1]), a[0], a[1])


@intrinsic
def widen(_: Any, x: Any) -> Any:
    """The same sixteen numbers as float64."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        return a[0] if x.element == "float64" else b.fpext(a[0], vector("float64"))

    return Lanes("float64")(x), generate


@intrinsic
def square_root(_: Any, x: Any) -> Any:
    """The square root of every lane."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        kind = a[0].type
        return call_llvm(b, f"llvm.sqrt.{suffix(kind)}", kind, [a[0]])

    return x(x), generate


@intrinsic
def vsum(_: Any, x: Any) -> Any:
    """The sum of the lanes in float64: halves are added until one number is left, the same order on every machine."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        total = a[0] if x.element == "float64" else b.fpext(a[0], vector("float64"))
        width = LANES
        while width > 1:
            width //= 2
            low = ir.Constant(ir.VectorType(_INT32, width), list(range(width)))
            high = ir.Constant(ir.VectorType(_INT32, width), list(range(width, 2 * width)))
            total = b.fadd(b.shuffle_vector(total, total, low), b.shuffle_vector(total, total, high))
        return b.extract_element(total, ir.Constant(_INT32, 0))

    return types.float64(x), generate
