"""Normalization per channel on a CPU: Numba kernels on torch's threads, for both memory layouts.

Statistics gather in float32 lanes over at most 4096 values about one of them, and merge in float64 in a fixed order:
results are the same in every bit for any number of threads, because the work is cut by shape alone. Half precision is
widened to float32 as it is read; float64 computes in float64.

`forward`, `inference` and `backward` are the fused wholes. Tensors come checked, dense and in the layout that
`layout_of` names.
"""

import ctypes
import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from . import compiled, slots, threads
from .arguments import GROUP
from .pages import ask_for_large_pages

__all__ = ["ELEMENTS", "backward", "forward", "inference", "layout_of"]

ELEMENTS = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_Context = ctypes.c_int64 * (slots.COUNT + 1)
_GRAIN = 32768  # elements that are worth a thread
_L2 = 1 << 19  # bytes of one task's tensors that should stay in the cache nearest the core
_STREAMED = 1 << 24  # bytes of output from which the caches are passed by
_FEW_CHANNELS = 16
_FEW_ROWS = 512


@dataclass(frozen=True, slots=True)
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
    stream: bool


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
    blocks = 1 if fused else max(1, min(64, rows * channels // _GRAIN, folded // 32))
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
        stream=_is_streamed(rows * channels * itemsize, channels * fold * itemsize, itemsize),
    )


def _is_streamed(size: int, run: int, itemsize: int) -> bool:
    # A streaming store needs its address aligned to a whole vector, and torch aligns memory to 64 bytes.
    return size >= _STREAMED and itemsize <= 4 and run % (16 * itemsize) == 0


def _bits(number: float) -> int:
    found: int = struct.unpack("q", struct.pack("d", number))[0]
    return found


class _Call:
    """One call of the kernels: the context of slots, and the memory that must outlive it."""

    def __init__(self, x: Tensor, layout: str, activation: str | None, residual: bool) -> None:
        self.plan = cut = plan(tuple(x.shape), layout, x.element_size())
        self.kind = (ELEMENTS[x.dtype], activation, residual)
        self.work = torch.empty(cut.partials + 5 * cut.width, dtype=torch.float64)
        self.context = c = _Context()
        c[slots.X] = x.data_ptr()
        c[slots.PARTIALS] = self.work.data_ptr()
        c[slots.COEFFICIENTS] = self.work.data_ptr() + 8 * cut.partials
        c[slots.OUTER], c[slots.CHANNELS], c[slots.INNER] = cut.outer, cut.channels, cut.inner
        c[slots.GROUP], c[slots.BLOCKS], c[slots.FOLD], c[slots.WIDTH] = cut.group, cut.blocks, cut.fold, cut.width
        c[slots.COUNT] = cut.outer * cut.inner
        c[slots.STREAM] = cut.stream

    def run(self, name: str, tasks: int, grain: int) -> None:
        """Run one kernel of this call's layout over its tasks."""
        threads.parallel_for(tasks, grain, compiled.address(name, *self.kind), self.context)

    def run_plain(self, name: str, tasks: int) -> None:
        """Run one step over channels, which neither the activation nor the residual changes."""
        address = compiled.address(name, self.kind[0], None, False)
        threads.parallel_for(tasks, 4096, address, self.context)

    def run_apply(self, name: str) -> None:
        """Run a step that writes a tensor from the coefficients."""
        cut = self.plan
        if cut.layout == "planes":
            self.run(f"planes.{name}", cut.outer * cut.channels, max(1, _GRAIN // cut.inner))
        elif cut.fused:
            # One block of all rows would be one task; few rows are cut by rows here.
            self.context[slots.BLOCKS] = blocks = max(1, min(cut.outer, 16))
            self.run(f"rows.{name}", blocks, max(1, _GRAIN * blocks // (cut.outer * cut.channels)))
            self.context[slots.BLOCKS] = cut.blocks
        else:
            self.run(f"rows.{name}", cut.blocks, 1)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _like(x: Tensor) -> Tensor:
    output = torch.empty_like(x)
    ask_for_large_pages(output)
    return output


def _computed(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """The parameter in the type computed in, contiguous."""
    if parameter is None:
        return None
    return parameter.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


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
    place. Returns y, and (2, C) float64 with mean and rstd.
    """
    call = _Call(x, layout, activation, residual is not None)
    c, cut = call.context, call.plan
    y = _like(x) if out is None else out
    saved = torch.empty((2, cut.channels), dtype=torch.float64)
    weight, bias = _computed(weight, x), _computed(bias, x)
    c[slots.Y], c[slots.RESIDUAL] = y.data_ptr(), _pointer(residual)
    c[slots.WEIGHT], c[slots.BIAS] = _pointer(weight), _pointer(bias)
    c[slots.RUNNING_MEAN], c[slots.RUNNING_VAR] = _pointer(running_mean), _pointer(running_var)
    c[slots.MEAN] = saved.data_ptr()
    c[slots.RSTD] = saved.data_ptr() + 8 * cut.channels
    c[slots.EPS], c[slots.MOMENTUM], c[slots.UNBIASED] = _bits(eps), _bits(momentum), unbiased
    if cut.fused:
        call.run(f"{cut.layout}.forward", cut.tasks, cut.grain)
    else:
        call.run(f"{cut.layout}.partial", cut.tasks, cut.grain)
        call.run_plain(f"{cut.layout}.finish", cut.channels)
        call.run_apply("apply")
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
    call = _Call(x, layout, activation, residual is not None)
    c, cut = call.context, call.plan
    y = _like(x) if out is None else out
    saved = torch.empty((2, cut.channels), dtype=torch.float64)
    held = [_computed(value, x) for value in (weight, bias, running_mean, running_var)]
    c[slots.Y], c[slots.RESIDUAL] = y.data_ptr(), _pointer(residual)
    c[slots.WEIGHT], c[slots.BIAS], c[slots.RUNNING_MEAN], c[slots.RUNNING_VAR] = map(_pointer, held)
    c[slots.MEAN] = saved.data_ptr()
    c[slots.RSTD] = saved.data_ptr() + 8 * cut.channels
    c[slots.EPS] = _bits(eps)
    call.run_plain("stored", cut.channels)
    call.run_apply("apply")
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
    call = _Call(x, layout, activation, residual)
    c, cut = call.context, call.plan
    dx = _like(x)
    dresidual = None
    if residual:
        dresidual = dy if activation is None else _like(x)
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.empty((2, cut.channels), dtype=computed)
    weight, bias = _computed(weight, x), _computed(bias, x)
    c[slots.DY], c[slots.DX], c[slots.DRESIDUAL] = dy.data_ptr(), dx.data_ptr(), _pointer(dresidual)
    c[slots.RESIDUAL] = _pointer(other)
    c[slots.WEIGHT], c[slots.BIAS] = _pointer(weight), _pointer(bias)
    c[slots.DWEIGHT] = sums.data_ptr()
    c[slots.DBIAS] = sums.data_ptr() + sums.element_size() * cut.channels
    c[slots.MEAN] = saved.data_ptr()
    c[slots.RSTD] = saved.data_ptr() + 8 * cut.channels
    c[slots.FROZEN] = frozen
    call.run_plain("coefficients", cut.channels)
    if cut.fused:
        call.run(f"{cut.layout}.backward", cut.tasks, cut.grain)
    else:
        call.run(f"{cut.layout}.backward_partial", cut.tasks, cut.grain)
        call.run_plain(f"{cut.layout}.finish_sums", cut.channels)
        call.run_apply("apply_backward")
    return dx, sums[0], sums[1], dresidual
