"""How Python hands the CPU kernels with statistics per channel their work: slots, working memory, tasks.

The code between call and kernel is short on purpose: on a small tensor it costs as much as the kernel.
"""

import ctypes
import functools
import struct

import torch
from torch import Tensor

from ...threads import parallel_for
from .. import compiled, slots
from .plan import GRAIN, Plan

__all__ = [
    "ELEMENTS",
    "SLOTS",
    "Context",
    "computed",
    "computed_type",
    "kernel",
    "pointer",
    "run_over_channels",
    "run_over_tensor",
    "run_tasks",
    "working_memory",
]

ELEMENTS = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
Context = ctypes.c_int64 * slots.SIZE
# Sixteen addresses, ten sizes, eps and momentum, three switches, one address: the slots in their order.
SLOTS = struct.Struct("26q2d4q")
assert SLOTS.size == 8 * slots.SIZE


@functools.cache
def kernel(name: str, dtype: torch.dtype, activation: str | None, residual: bool) -> int:
    """Return the address of a kernel, compiled on the way where it is not cached."""
    return compiled.address(name, ELEMENTS[dtype], activation, residual)


def pointer(tensor: Tensor | None) -> int:
    """Return the address of a tensor's memory, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def computed(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the parameter in the type computed in, contiguous."""
    if parameter is None or (parameter.dtype is dtype and parameter.is_contiguous()):
        return parameter
    return parameter.detach().to(dtype).contiguous()


def computed_type(x: Tensor) -> torch.dtype:
    """Return the type that the kernels compute in."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def working_memory(cut: Plan) -> Tensor | None:
    """Return the float64 numbers that blocks leave their partial results in."""
    return torch.empty(cut.partials, dtype=torch.float64) if cut.partials else None


def run_tasks(
    name: str, x: Tensor, cut: Plan, activation: str | None, residual: bool, context: ctypes.Array[ctypes.c_int64]
) -> None:
    """Run a kernel over the tasks of the plan."""
    address = kernel(f"{cut.layout}.{name}", x.dtype, activation, residual)
    parallel_for(cut.tasks, cut.grain, address, context)


def run_over_channels(name: str, x: Tensor, cut: Plan, context: ctypes.Array[ctypes.c_int64]) -> None:
    """Run a step that is one number per channel; neither the activation nor the residual changes it."""
    tasks, grain = cut.channels, 2048
    if name == "stored" or (cut.layout == "channels_last" and not name.startswith("given")):
        # Sixteen channels to a task; folded columns of one channel must stay in one.
        tasks, grain = (-(-cut.channels // 16), 256) if cut.fold == 1 else (1, 1)
    parallel_for(tasks, grain, kernel(name, x.dtype, None, False), context)


def run_over_tensor(
    name: str, x: Tensor, cut: Plan, activation: str | None, residual: bool, context: ctypes.Array[ctypes.c_int64]
) -> None:
    """Run a step that writes a tensor from the coefficients."""
    address = kernel(f"{cut.layout}.{name}", x.dtype, activation, residual)
    if cut.layout == "contiguous":
        parallel_for(cut.outer * cut.channels, max(1, GRAIN // cut.inner), address, context)
        return
    # Nothing is gathered here, so that the blocks need not be those of the statistics.
    blocks = max(cut.blocks, min(64, cut.outer // cut.fold))
    context[slots.BLOCKS] = blocks
    parallel_for(blocks, max(1, GRAIN * blocks // (cut.outer * cut.channels)), address, context)
