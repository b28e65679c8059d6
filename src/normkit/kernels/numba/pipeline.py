"""How Numba compiles kernels and what they call: the passes that they need, and machine code of whole kernels alone.

Numba makes optimized machine code of every function by itself, and then once more of each that calls it. What a kernel
is made of is only ever inlined into one, where it is optimized in any case: without that it takes half of the time.
"""

import functools
from typing import Any

from numba.core import compiler, typed_passes, untyped_passes
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_machinery import PassManager, register_pass

__all__ = ["KernelCompiler", "PartCompiler"]

# Of Numba's passes those that find something in a kernel. It has no closures, no exceptions, no objects, no inlining by
# Numba and no variable of two types.
_PASSES = (
    untyped_passes.TranslateByteCode,
    untyped_passes.FixupArgs,
    untyped_passes.IRProcessing,
    typed_passes.NopythonTypeInference,
    typed_passes.IRLegalization,
)


class _PartLibrary(JITCodeLibrary):
    """Code that is linked into kernels and never run by itself."""

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        """Leave it to the kernel."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(typed_passes.NativeLowering):
    _name = "normkit_part_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        # Numba knows what is compiled by where Python enters it, a function in C of its own. Nothing enters this one.
        nothing: list[Any] = []
        entrance = nothing.append
        state.cr = state.cr._replace(cfunc=entrance)
        state.targetctx.insert_user_function(entrance, state.cr.fndesc, [state.library])
        return True


@functools.cache
def _passes(name: str, lowering: type) -> PassManager:
    manager = PassManager(name)
    for step in (*_PASSES, lowering, typed_passes.NoPythonBackend):
        manager.add_pass(step, step.__name__)
    manager.finalize()
    return manager


class KernelCompiler(compiler.Compiler):
    """For kernels, which are called by their address."""

    def define_pipelines(self) -> list[PassManager]:
        """Return the passes in their order."""
        return [_passes("kernel", typed_passes.NativeLowering)]


class PartCompiler(compiler.CompilerBase):
    """For functions that kernels call."""

    def define_pipelines(self) -> list[PassManager]:
        """Return the passes in their order."""
        return [_passes("part", _PartLowering)]
