"""How Python hands the CPU kernels with statistics per channel their work: slots, working memory, tasks.

The code between call and kernel is short on purpose: on a small tensor it costs as much as the kernel.
"""

import ctypes
import functools
import struct

import torch
from torch import Tensor

from ....errors import StatisticsError
from ...layouts import readable
from ...threads import parallel_for
from .. import slots
from .kernels import KERNELS
from .plan import GRAIN, Plan

__all__ = [
    "ELEMENTS",
    "SLOTS",
    "Context",
    "addresses",
    "check_apart",
    "computed",
    "computed_type",
    "kernel",
    "launch_over_channels",
    "launch_over_tensor",
    "pointer",
    "prepare",
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
    return KERNELS.address(name, ELEMENTS[dtype], activation, residual)


def pointer(tensor: Tensor | None) -> int:
    """Return the address of a tensor's memory, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


_Four = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def addresses(
    x: Tensor, one: Tensor | None = None, two: Tensor | None = None, three: Tensor | None = None
) -> tuple[_Four, tuple[int, int, int, int]]:
    """Return up to four tensors as a kernel may read them, and where their values stand, 0 for None.

    They are those given, unless memory does not hold their values: then copies, which must live as long as the kernel
    runs. Written out, for a loop over the four takes twice as long.
    """
    where = x.data_ptr()
    first, second = 0 if one is None else one.data_ptr(), 0 if two is None else two.data_ptr()
    third = 0 if three is None else three.data_ptr()
    if (
        x.is_neg()
        or not where
        or (one is not None and (one.is_neg() or not first))
        or (two is not None and (two.is_neg() or not second))
        or (three is not None and (three.is_neg() or not third))
    ):
        return addresses(readable(x), *(None if given is None else readable(given) for given in (one, two, three)))
    return (x, one, two, three), (where, first, second, third)


def check_apart(size: int, mean: int, var: int, weight: int, bias: int, x: int, residual: int, span: int) -> None:
    """Refuse running statistics that share memory with each other or with what is read while they are written.

    All are addresses, 0 where absent: of ``size`` bytes each, of ``span`` bytes x and the residual.

    Raises:
        StatisticsError: they do, or have no memory. Nothing has been written.
    """
    if not (mean and var):
        raise StatisticsError("running_mean or running_var has no memory to be written; pass clones of both")
    if (
        -size < mean - var < size
        or -size < mean - weight < size
        or -size < mean - bias < size
        or -size < var - weight < size
        or -size < var - bias < size
        or -size < mean - x < span
        or -size < var - x < span
        or (residual and (-size < mean - residual < span or -size < var - residual < span))
    ):
        raise StatisticsError(
            "running_mean and running_var share memory with each other or with another argument, which is read while "
            "they are written; pass running_mean.clone() and running_var.clone()"
        )


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
    return torch.empty(cut.partials, dtype=torch.float64, device="cpu") if cut.partials else None


def prepare(cut: Plan) -> tuple[ctypes.Array[ctypes.c_int64], Tensor | None, int, int]:
    """Return the slots of a call and its working memory, where the partial results lie in it, and the coefficients.

    Every call has its own: several threads may run backward over one graph.
    """
    context = cut.context()
    if not cut.partials:
        return context, None, 0, ctypes.addressof(context) + 8 * slots.SIZE
    memory = torch.empty(cut.partials + 5 * cut.width, dtype=torch.float64)
    partials = memory.data_ptr()
    return context, memory, partials, partials + 8 * cut.partials


def run_tasks(
    name: str, x: Tensor, cut: Plan, activation: str | None, residual: bool, context: ctypes.Array[ctypes.c_int64]
) -> None:
    """Run a kernel over the tasks of the plan."""
    address = kernel(f"{cut.layout}.{name}", x.dtype, activation, residual)
    parallel_for(cut.tasks, cut.grain, address, context)


def launch_over_channels(name: str, cut: Plan) -> tuple[int, int]:
    """Return the tasks and the grain of a step that is one number per channel."""
    if name == "stored" or (cut.layout == "channels_last" and not name.startswith("given")):
        # Sixteen channels to a task; folded columns of one channel must stay in one.
        return (-(-cut.channels // 16), 256) if cut.fold == 1 else (1, 1)
    return cut.channels, 2048


def launch_over_tensor(cut: Plan) -> tuple[int, int, int]:
    """Return the tasks, the grain and the blocks of a step that writes a tensor from the coefficients."""
    if cut.layout == "contiguous":
        return cut.outer * cut.channels, max(1, GRAIN // cut.inner), cut.blocks
    # Nothing is gathered here, so that the blocks need not be those of the statistics.
    blocks = max(cut.blocks, min(64, cut.outer // cut.fold))
    return blocks, max(1, GRAIN * blocks // (cut.outer * cut.channels)), blocks


def run_over_channels(name: str, x: Tensor, cut: Plan, context: ctypes.Array[ctypes.c_int64]) -> None:
    """Run a step that is one number per channel; neither the activation nor the residual changes it."""
    parallel_for(*launch_over_channels(name, cut), kernel(name, x.dtype, None, False), context)


def run_over_tensor(
    name: str, x: Tensor, cut: Plan, activation: str | None, residual: bool, context: ctypes.Array[ctypes.c_int64]
) -> None:
    """Run a step that writes a tensor from the coefficients."""
    address = kernel(f"{cut.layout}.{name}", x.dtype, activation, residual)
    tasks, grain, context[slots.BLOCKS] = launch_over_tensor(cut)
    parallel_for(tasks, grain, address, context)
