"""Normalization per channel on a CPU: Numba kernels on torch's threads, for both memory layouts.

Statistics gather in float32 lanes over at most 4096 values about one of them, and merge in float64 in a fixed order:
results are the same in every bit for any number of threads, because the work is cut by shape alone. Half precision is
widened to float32 as it is read; float64 computes in float64.

`forward`, `inference` and `backward` are the fused wholes. Tensors come checked, dense and in the layout that
`layout_of` names. The code between call and kernel is short on purpose: on a small tensor it costs as much as the
kernel.
"""

import ctypes
import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from . import compiled, slots
from .arguments import GROUP
from .pages import ask_for_large_pages
from .threads import parallel_for

__all__ = ["ELEMENTS", "backward", "forward", "inference", "layout_of", "plan"]

ELEMENTS = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_Context = ctypes.c_int64 * slots.SIZE
# Sixteen addresses, ten sizes, eps and momentum, two switches: the slots in their order.
_SLOTS = struct.Struct("26q2d2q")
assert _SLOTS.size == 8 * slots.SIZE
_GRAIN = 32768  # elements that are worth a thread
_L2 = 1 << 19  # bytes of one task's tensors that should stay in the cache nearest the core
_STREAMED = 1 << 24  # bytes of output from which the caches are passed by
_FEW_CHANNELS = 16
_FEW_ROWS = 512


@dataclass(frozen=True)
class Plan:
    """How the work on one shape is cut. It depends on the shape and type alone."""

    layout: str
    fused: bool
    outer: int
    channels: int
    inner: int
    group: int
    blocks: int
    fold: int
    width: int
    tasks: int
    grain: int
    partials: int  # float64 numbers of working memory
    strip: int
    stream: bool

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The slots from OUTER to COUNT."""
        shape = (self.outer, self.channels, self.inner)
        cut = (self.group, self.blocks, self.fold, self.width, self.strip, self.stream)
        return (*shape, *cut, self.outer * self.inner)


def layout_of(x: Tensor) -> str | None:
    """Return "planes" for contiguous (N, C, *), "rows" for channels-last, None for what is neither."""
    if x.dim() == 2:
        return "rows" if x.is_contiguous() else None
    if x.is_contiguous():
        return "planes"
    if x.movedim(1, -1).is_contiguous():
        return "rows"
    return None


@functools.lru_cache(maxsize=4096)
def plan(shape: tuple[int, ...], layout: str, itemsize: int) -> Plan:
    """Cut the work on a tensor of this shape, layout and element size."""
    samples, channels = shape[:2]
    positions = math.prod(shape[2:])
    if layout == "planes" and positions == 1:
        layout = "rows"
    return (_plan_planes if layout == "planes" else _plan_rows)(samples, channels, positions, itemsize)


def _plan_planes(samples: int, channels: int, positions: int, itemsize: int) -> Plan:
    values = samples * positions
    stream = _is_streamed(values * channels * itemsize, positions * itemsize, itemsize)
    chunks = -(-samples // max(1, 4096 // positions)) if positions <= 4096 else samples * -(-positions // 4096)
    fused = channels >= _FEW_CHANNELS or values * channels < 4 * _GRAIN
    group = 1
    if fused and positions < 1024:
        # Side by side in memory up to a page, as long as the tasks stay enough and fit the cache.
        fitting = max(1, _L2 // (2 * values * itemsize))
        group = max(1, min(GROUP, -(-1024 // positions), fitting, channels // 8))
    blocks = 1 if fused else min(chunks, 32)
    return Plan(
        layout="planes",
        fused=fused,
        outer=samples,
        channels=channels,
        inner=positions,
        group=group,
        blocks=blocks,
        fold=1,
        width=channels,
        tasks=-(-channels // group) if fused else channels * blocks,
        grain=max(1, _GRAIN // (values * group if fused else max(1, values // blocks))),
        partials=0 if fused else 3 * channels * blocks,
        strip=1,
        stream=stream,
    )


def _plan_rows(samples: int, channels: int, positions: int, itemsize: int) -> Plan:
    rows = samples * positions
    fused = rows <= _FEW_ROWS and channels >= 64
    fold = 1
    if not fused and channels % 16 and channels < 128:
        period = 16 // math.gcd(channels, 16)
        fold = period if rows >= 8 * period else 1
    width = -(-channels * fold // 16) * 16
    group = 16 * max(1, min(16, width // 256)) if fused else 1
    folded = rows // fold
    # Blocks of a few hundred rows: merging one costs about as much as reading four rows.
    blocks = 1 if fused else max(1, min(64, rows * channels // _GRAIN, folded // 128))
    return Plan(
        layout="rows",
        fused=fused,
        outer=rows,
        channels=channels,
        inner=1,
        group=group,
        blocks=blocks,
        fold=fold,
        width=width,
        tasks=-(-width // group) if fused else blocks,
        grain=max(1, _GRAIN // (rows * group)) if fused else 1,
        partials=5 * width * blocks,
        strip=16 if width <= 256 else 8,
        stream=_is_streamed(rows * channels * itemsize, channels * fold * itemsize, itemsize),
    )


def _is_streamed(size: int, run: int, itemsize: int) -> bool:
    # A streaming store needs its address aligned to a whole vector, and torch aligns memory to 64 bytes.
    return size >= _STREAMED and itemsize <= 4 and run % (16 * itemsize) == 0


@functools.cache
def _kernel(name: str, dtype: torch.dtype, activation: str | None, residual: bool) -> int:
    return compiled.address(name, ELEMENTS[dtype], activation, residual)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _like(x: Tensor) -> Tensor:
    output = torch.empty_like(x)
    ask_for_large_pages(output)
    return output


def _computed(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the parameter in the type computed in, contiguous."""
    if parameter is None or (parameter.dtype is dtype and parameter.is_contiguous()):
        return parameter
    return parameter.detach().to(dtype).contiguous()


def _working_memory(cut: Plan) -> Tensor | None:
    return torch.empty(cut.partials, dtype=torch.float64) if cut.partials else None


def _run_over_channels(name: str, x: Tensor, cut: Plan, context: ctypes.Array[ctypes.c_int64]) -> None:
    """Run a step that is one number per channel; neither the activation nor the residual changes it."""
    tasks, grain = cut.channels, 2048
    if cut.layout == "rows" or name == "stored":
        # Sixteen channels to a task; folded columns of one channel must stay in one.
        tasks, grain = (-(-cut.channels // 16), 256) if cut.fold == 1 else (1, 1)
    parallel_for(tasks, grain, _kernel(name, x.dtype, None, False), context)


def _run_over_tensor(
    name: str, x: Tensor, cut: Plan, activation: str | None, residual: bool, context: ctypes.Array[ctypes.c_int64]
) -> None:
    """Run a step that writes a tensor from the coefficients."""
    kernel = _kernel(f"{cut.layout}.{name}", x.dtype, activation, residual)
    if cut.layout == "planes":
        parallel_for(cut.outer * cut.channels, max(1, _GRAIN // cut.inner), kernel, context)
        return
    # Nothing is gathered here, so that the blocks need not be those of the statistics.
    blocks = max(cut.blocks, min(64, cut.outer // cut.fold))
    context[slots.BLOCKS] = blocks
    parallel_for(blocks, max(1, _GRAIN * blocks // (cut.outer * cut.channels)), kernel, context)


def forward(
    x: Tensor,
    layout: str,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    unbiased: bool,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize with the batch's statistics, move the running ones, apply activation(y + residual).

    The running statistics are of the type computed in, and contiguous. With ``out`` y is written there: x itself for in
    place. Returns y, and what the backward needs: mean, rstd and the coefficients of every channel.
    """
    cut = plan(tuple(x.shape), layout, x.element_size())
    computed = torch.float64 if x.dtype is torch.float64 else torch.float32
    weight, bias = _computed(weight, computed), _computed(bias, computed)
    y, partials = _like(x) if out is None else out, _working_memory(cut)
    saved = torch.empty(2 * cut.channels + 5 * cut.width, dtype=torch.float64)
    mean, one = saved.data_ptr(), 8 * cut.channels
    tensors = (x.data_ptr(), y.data_ptr(), _pointer(residual), 0, 0, 0, _pointer(weight), _pointer(bias))
    state = (_pointer(running_mean), _pointer(running_var), 0, 0, mean, mean + one, _pointer(partials))
    context = _Context()
    _SLOTS.pack_into(context, 0, *tensors, *state, mean + 2 * one, *cut.sizes, eps, momentum, unbiased, False)
    if cut.fused:
        kernel = _kernel(f"{cut.layout}.forward", x.dtype, activation, residual is not None)
        parallel_for(cut.tasks, cut.grain, kernel, context)
    else:
        parallel_for(cut.tasks, cut.grain, _kernel(f"{cut.layout}.partial", x.dtype, None, False), context)
        _run_over_channels(f"{cut.layout}.finish", x, cut, context)
        _run_over_tensor("apply", x, cut, activation, residual is not None, context)
    return y, saved


def inference(
    x: Tensor,
    layout: str,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize with stored statistics. Arguments and result as `forward`."""
    cut = plan(tuple(x.shape), layout, x.element_size())
    computed = torch.float64 if x.dtype is torch.float64 else torch.float32
    y = _like(x) if out is None else out
    held = [_computed(value, computed) for value in (weight, bias, running_mean, running_var)]
    saved = torch.empty(2 * cut.channels + 5 * cut.width, dtype=torch.float64)
    mean, one = saved.data_ptr(), 8 * cut.channels
    pointers = (x.data_ptr(), y.data_ptr(), _pointer(residual), 0, 0, 0, *map(_pointer, held))
    context = _Context()
    _SLOTS.pack_into(
        context, 0, *pointers, 0, 0, mean, mean + one, 0, mean + 2 * one, *cut.sizes, eps, 0.0, False, False
    )
    _run_over_channels("stored", x, cut, context)
    _run_over_tensor("apply", x, cut, activation, residual is not None, context)
    return y, saved


def backward(
    dy: Tensor,
    x: Tensor,
    layout: str,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    activation: str | None = None,
    other: Tensor | None = None,
    residual: bool = False,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dx, dweight, dbias and the gradient of the residual.

    ``saved`` is what the forward returned. With residual and activation ``other`` decides the slope: the output for
    relu, relu6 and leaky_relu, the residual for silu. ``frozen`` says that the statistics were constants.
    """
    cut = plan(tuple(x.shape), layout, x.element_size())
    computed = torch.float64 if x.dtype is torch.float64 else torch.float32
    weight = _computed(weight, computed)
    dx, partials = _like(x), _working_memory(cut)
    dresidual = None
    if residual:
        dresidual = dy if activation is None else _like(x)
    dweight, dbias = torch.empty(cut.channels, dtype=computed), torch.empty(cut.channels, dtype=computed)
    mean, one = saved.data_ptr(), 8 * cut.channels
    tensors = (x.data_ptr(), 0, _pointer(other), dy.data_ptr(), dx.data_ptr(), _pointer(dresidual), _pointer(weight))
    state = (0, 0, 0, dweight.data_ptr(), dbias.data_ptr(), mean, mean + one, _pointer(partials), mean + 2 * one)
    context = _Context()
    _SLOTS.pack_into(context, 0, *tensors, *state, *cut.sizes, 0.0, 0.0, False, frozen)
    if cut.fused:
        parallel_for(cut.tasks, cut.grain, _kernel(f"{cut.layout}.backward", x.dtype, activation, residual), context)
    else:
        kernel = _kernel(f"{cut.layout}.backward_partial", x.dtype, activation, residual)
        parallel_for(cut.tasks, cut.grain, kernel, context)
        _run_over_channels(f"{cut.layout}.finish_sums", x, cut, context)
        _run_over_tensor("apply_backward", x, cut, activation, residual, context)
    return dx, dweight, dbias, dresidual
