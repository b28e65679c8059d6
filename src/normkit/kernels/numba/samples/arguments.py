"""Arguments that a kernel changes for itself: those of a whole tensor, made to stand for one sample of it."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..vectors import INT64, Arguments
from . import slots as sample_slots


@intrinsic
def own_copy(_: Any, arguments: Arguments) -> Any:
    """Copy the slots to the stack, where a kernel may write to them."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        kind = ir.ArrayType(INT64, sample_slots.SIZE)
        memory = cgutils.alloca_once(b, kind)
        b.store(b.load(b.bitcast(a[0], kind.as_pointer())), memory)
        return b.bitcast(memory, INT64.as_pointer())

    return arguments(arguments), generate


@intrinsic
def put(_: Any, arguments: Arguments, index: Any, value: Any) -> Any:
    """Write a slot of the kernel's own copy."""

    def generate(c: Any, b: ir.IRBuilder, s: Any, a: Any) -> ir.Value:
        b.store(a[2], b.gep(a[0], [a[1]]))
        return c.get_dummy_value()

    return types.void(arguments, types.int64, types.int64), generate
