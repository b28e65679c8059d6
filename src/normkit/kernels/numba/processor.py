"""What the processor that kernels are compiled for can do, asked of the compiler itself."""

import functools
from typing import Any

import torch

__all__ = ["has_avx512", "unavailable"]

# Both ways between the two types, apart: one after the other would cancel. Where the processor has no instruction for
# it, LLVM calls a function of its runtime library that the process does not hold, and ends the process when it links.
_CONVERSIONS = """
define void @widen(ptr %from, ptr %to) {
  %half = load <16 x half>, ptr %from, align 1
  %wide = fpext <16 x half> %half to <16 x float>
  store <16 x float> %wide, ptr %to, align 1
  ret void
}
define void @narrow(ptr %from, ptr %to) {
  %wide = load <16 x float>, ptr %from, align 1
  %half = fptrunc <16 x float> %wide to <16 x half>
  store <16 x half> %half, ptr %to, align 1
  ret void
}
"""


def unavailable(dtype: torch.dtype) -> str | None:
    """Return why no kernel can be compiled for inputs of this type, or None where it can."""
    if dtype is torch.float16 and not _converts_float16():
        return "this processor cannot convert float16 (F16C on x86); bfloat16 needs no instruction of its own"
    return None


@functools.cache
def has_avx512() -> bool:
    """Say whether there are 32 registers of sixteen lanes, and stores under a mask; AVX2 has 16 registers of eight."""
    return "+avx512f" in _machine()[1].split(",")


def _machine() -> tuple[Any, str]:
    """Return the machine that Numba compiles for, NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included, and what it has."""
    from numba.core.registry import cpu_target

    codegen = cpu_target.target_context.codegen()
    return codegen._tm, codegen.magic_tuple()[2]


def _converts_float16() -> bool:
    from llvmlite import binding

    machine, _ = _machine()
    module = binding.parse_assembly(_CONVERSIONS)
    module.triple = machine.triple
    assembly = machine.emit_assembly(module)
    return not any(name in assembly for name in ("hfsf2", "sfhf2", "__gnu_h2f", "__gnu_f2h"))
