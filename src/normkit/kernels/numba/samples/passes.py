"""Normalization per sample on a CPU: layer, RMS, group and instance norm, Numba kernels on torch's threads.

One normalization is GROUPS groups of neighbouring channels in each of N samples. Memory decides which kernels serve it:

- ``elementwise``: a sample is one row of C elements with a weight each. Layer and RMS norm, group norm of ``(N, C)``.
- ``contiguous``: contiguous ``(N, C, *)``; a channel is a plane with one weight.
- ``channels_last``: channels-last ``(N, C, *)``.

Numerics are those of `channels.passes`: float32 lanes over at most 2048 values, merged in float64 in an order that the
shape alone decides; dweight and dbias are sums of chunks of samples, added in float64 in their order.
"""

import ctypes
import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...forms import Form, form_of, form_of_rows
from ...memory import empty_like
from ...threads import parallel_for
from .. import slots
from ..channels.launch import ELEMENTS, addresses, computed_type, pointer
from ..channels.plan import LINE, is_streamed
from . import slots as sample_slots
from .elementwise import STRIP
from .kernels import KERNELS

__all__ = [
    "Form",
    "Plan",
    "backward",
    "backward_launches",
    "constant",
    "describe",
    "form_of",
    "form_of_rows",
    "forward",
    "forward_launches",
    "has_tables",
    "kernel",
    "plan",
    "prepared",
    "total_launch",
]

_Context = ctypes.c_int64 * sample_slots.SIZE
# Sixteen addresses, ten sizes, eps and momentum, settings that are all zero here, and what sample_slots adds.
_UNUSED = (0,) * (slots.SIZE - slots.UNBIASED)
_SLOTS = struct.Struct(f"26q2d{sample_slots.SIZE - slots.UNBIASED}q")
assert _SLOTS.size == 8 * sample_slots.SIZE
_ADDRESSES = struct.Struct("16q")
_GRAIN = 32768  # elements of which tensors are cut into parts
_THREAD = 16384  # elements that are worth a thread
_TASKS = 32  # tasks to cut a tensor of few groups into
_STRIP_BYTES = 1 << 18  # of a strip of samples, which the backward reads twice
# A step, its tasks and their grain, and the tasks that share a group or a sample.
Launch = tuple[int, int, int, int]
_REGION = 5  # float64 numbers of working memory per column of a block of channels-last rows


@dataclass(frozen=True, slots=True)
class Plan:
    """How the work on a form is cut. It depends on the form and the type alone.

    Attributes:
        sizes: the slots from OUTER to COUNT.
        tasks: of a launch that does everything.
        grain: the fewest tasks that are worth a thread.
        parts: tasks that share a group of planes, or a sample of columns; 1 where a task does everything.
        pieces: that a plane is cut into.
        chunks: rows of the tables of dweight and dbias.
        work: float64 numbers of working memory.
        coefficients: float64 numbers of coefficients.
        backward_tasks: as ``tasks``, of the backward.
        backward_grain: as ``grain``, of the backward.
    """

    sizes: tuple[int, ...]
    tasks: int
    grain: int
    parts: int
    pieces: int
    chunks: int
    work: int
    coefficients: int
    backward_tasks: int
    backward_grain: int


def describe(layer: nn.Module, x: Tensor) -> str:
    """Say how the work is cut for one of torch's layer, RMS, group or instance norms, or one of ours."""
    given = x
    for x in (given, given.contiguous()):
        if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
            form = form_of_rows(x, len(layer.normalized_shape))
        else:
            form = form_of(x, layer.num_groups if isinstance(layer, nn.GroupNorm) else x.shape[1])
        if form is not None:
            break
    assert form is not None
    cut = plan(form, x.element_size())
    way = "statistics and output in one task" if cut.parts == 1 else "step by step"
    copied = "" if x is given else ", after a copy into contiguous memory"
    return f"per sample, {form.layout}, {way}, {cut.tasks} tasks, {torch.get_num_threads()} threads{copied}"


@functools.lru_cache(maxsize=4096)
def plan(form: Form, itemsize: int) -> Plan:
    """Cut the work."""
    plans = {"elementwise": _plan_elementwise, "contiguous": _plan_contiguous, "channels_last": _plan_channels_last}
    return plans[form.layout](form, itemsize)


def _sizes(form: Form, group: int, blocks: int, fold: int, width: int, strip: int, stream: bool) -> tuple[int, ...]:
    shape = (form.samples, form.channels, form.positions)
    if form.layout == "channels_last":
        # A sample is a channels-last tensor of its own.
        shape = (form.positions, form.channels, 1)
    return (*shape, group, blocks, fold, width, strip, stream, 0)


def _plan_elementwise(form: Form, itemsize: int) -> Plan:
    samples, width = form.samples, form.channels
    # Sums gather in the type computed in, and at most 64 samples at a time.
    chunk = STRIP * max(2, min(16, samples // 64)) if samples * width > _GRAIN else 64
    strip = STRIP if STRIP * width * itemsize <= _STRIP_BYTES else 1
    chunks = -(-samples // chunk)
    # A backward in one thread reads what the forward wrote: from another core that costs more than the second brings.
    worth = _THREAD if chunks > 1 else _GRAIN
    return Plan(
        sizes=_sizes(form, chunk, 1, 1, width, strip, False),
        tasks=samples * form.groups,
        grain=max(1, worth // (width // form.groups)),
        parts=1,
        pieces=1,
        chunks=chunks,
        work=0,
        coefficients=0,
        backward_tasks=chunks,
        backward_grain=max(1, _THREAD // (width * chunk)),
    )


def _plan_contiguous(form: Form, itemsize: int) -> Plan:
    rows, planes = form.samples * form.groups, form.channels // form.groups
    size = planes * form.positions
    parts = pieces = 1
    if rows < _TASKS // 2 and rows * size >= 4 * _GRAIN:
        parts = max(1, min(_TASKS // rows, size // (_GRAIN // 2)))
        pieces = -(-parts // planes)
    return Plan(
        sizes=_sizes(form, 1, parts, 1, form.channels, 1, is_streamed(rows * size, form.positions, itemsize)),
        tasks=rows * parts,
        grain=max(1, _THREAD * parts // size),
        parts=parts,
        pieces=pieces,
        chunks=form.samples * pieces,
        work=3 * rows * parts if parts > 1 else 0,
        coefficients=0,
        backward_tasks=rows * parts,
        backward_grain=max(1, _THREAD * parts // size),
    )


def _plan_channels_last(form: Form, itemsize: int) -> Plan:
    samples, channels, rows = form.samples, form.channels, form.positions
    # Few channels are folded: several rows read as one, which fills whole vectors.
    fold = 16 // math.gcd(channels, 16) if channels < 128 else 1
    if rows % fold or rows < 8 * fold:
        fold = 1
    width = -(-channels * fold // 16) * 16
    parts = 1
    if samples < _TASKS // 2 and samples * rows * channels >= 4 * _GRAIN:
        parts = max(1, min(_TASKS // samples, rows // fold // 16, rows * channels // (_GRAIN // 2)))
    stream = is_streamed(samples * rows * channels, channels * fold, itemsize, by_columns=True)
    return Plan(
        sizes=_sizes(form, 1, parts, fold, width, 1, stream),
        tasks=samples * parts,
        grain=max(1, _THREAD * parts // (rows * channels)),
        parts=parts,
        pieces=1,
        chunks=samples,
        work=_REGION * width * parts * samples,
        coefficients=5 * width * samples,
        backward_tasks=samples * parts,
        backward_grain=max(1, _THREAD * parts // (rows * channels)),
    )


@functools.cache
def kernel(name: str, dtype: torch.dtype, activation: str | None) -> int:
    """Return the address of a kernel, compiled on the way where it is not cached."""
    return KERNELS.address(name, ELEMENTS[dtype], activation, False)


def _parameter(value: Tensor | None, absent: float, form: Form, dtype: torch.dtype) -> Tensor | None:
    """Return a weight or bias in the type computed in; rows read both everywhere, and get constants for absent ones."""
    if value is None:
        return constant(absent, form.channels, dtype) if form.layout == "elementwise" else None
    if value.dtype is dtype and value.is_contiguous():
        return value
    return value.detach().to(dtype).contiguous()


@functools.lru_cache(maxsize=16)
def constant(value: float, size: int, dtype: torch.dtype) -> Tensor:
    """Return what stands for an absent weight or bias."""
    return torch.full((size,), value, dtype=dtype)


@functools.lru_cache(maxsize=4096)
def prepared(form: Form, itemsize: int, eps: float, centred: bool, wanted: bool) -> tuple[Plan, bytes]:
    """Return the plan, and the slots of a call that has no addresses yet: on a small tensor packing them costs most."""
    cut, slots_of_call = plan(form, itemsize), _Context()
    settings = (*cut.sizes, eps, 0.0, *_UNUSED, form.groups, 0, 1, cut.pieces, itemsize, centred, wanted, 0)
    _SLOTS.pack_into(slots_of_call, 0, *(0,) * slots.OUTER, *settings)
    return cut, bytes(slots_of_call)


def forward(
    x: Tensor,
    form: Form,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    activation: str | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize every group, scale, shift, apply the activation; return y and what the backward needs: mean and rstd.

    Where ``variance`` is given, N * groups float64 numbers, the groups' variances are written there.
    """
    cut, template = prepared(form, x.element_size(), eps, centred, False)
    computed = computed_type(x)
    weight, bias = _parameter(weight, 1.0, form, computed), _parameter(bias, 0.0, form, computed)
    _held, (x_at, weight_at, bias_at, _) = addresses(x, weight, bias)
    y, rows = empty_like(x), form.samples * form.groups
    saved = torch.empty((2, rows), dtype=torch.float64)
    work = torch.empty(cut.work + cut.coefficients, dtype=torch.float64) if cut.work else None
    mean, memory = saved.data_ptr(), pointer(work)
    context, y_at = _Context.from_buffer_copy(template), y.data_ptr()
    working = (mean, mean + 8 * rows, memory, memory + 8 * cut.work)
    _ADDRESSES.pack_into(context, 0, x_at, y_at, 0, 0, 0, 0, weight_at, bias_at, 0, 0, 0, 0, *working)
    if y_at % LINE:
        context[slots.STREAM] = False
    if variance is not None:
        context[sample_slots.VARIANCE] = variance.data_ptr()
    _launch(f"samples.{form.layout}.forward", x.dtype, activation, forward_launches(form, cut), context)
    return y, saved


def forward_launches(form: Form, cut: Plan) -> tuple[Launch, ...]:
    """Return the launches of the forward kernel in their order."""
    if cut.parts == 1:
        return ((sample_slots.WHOLE, cut.tasks, cut.grain, 1),)
    merge = ((sample_slots.FINISH, form.samples, 1, 1),) if form.layout == "channels_last" else ()
    return (
        (sample_slots.GATHER, cut.tasks, cut.grain, cut.parts),
        *merge,
        (sample_slots.APPLY, cut.tasks, cut.grain, cut.parts),
    )


def backward_launches(form: Form, cut: Plan) -> tuple[Launch, ...]:
    """Return the launches of the backward kernel in their order."""
    if cut.parts == 1:
        return ((sample_slots.WHOLE, cut.backward_tasks, cut.backward_grain, 1),)
    columns = form.layout == "channels_last"
    return (
        *(((sample_slots.PREPARE, form.samples, 1, 1),) if columns else ()),
        (sample_slots.GATHER, cut.backward_tasks, cut.backward_grain, cut.parts),
        *(((sample_slots.FINISH, form.samples, 1, 1),) if columns else ()),
        (sample_slots.APPLY, cut.backward_tasks, cut.backward_grain, cut.parts),
    )


def has_tables(form: Form, cut: Plan, wanted: bool) -> bool:
    """Tell whether the backward leaves sums in tables, one row of C for each chunk."""
    return cut.chunks > 1 if wanted else form.layout != "elementwise"


def total_launch(chunks: int, channels: int) -> tuple[int, int]:
    """Return the tasks and the grain of the kernel that adds the chunks' rows of both tables."""
    return -(-channels // 16), max(1, _THREAD // (16 * chunks))


def _launch(
    name: str,
    dtype: torch.dtype,
    activation: str | None,
    launches: tuple[Launch, ...],
    context: ctypes.Array[ctypes.c_int64],
) -> None:
    """Run the steps of a kernel."""
    address = kernel(name, dtype, activation)
    for step, tasks, grain, parts in launches:
        context[sample_slots.STEP], context[sample_slots.PARTS] = step, parts
        parallel_for(tasks, grain, address, context)


def backward(
    dy: Tensor,
    x: Tensor,
    form: Form,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    centred: bool = True,
    activation: str | None = None,
    wanted: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dx and, where wanted, dweight and dbias of C elements in the type computed in."""
    cut, template = prepared(form, x.element_size(), 0.0, centred, wanted)
    computed = computed_type(x)
    weight, bias = _parameter(weight, 1.0, form, computed), _parameter(bias, 0.0, form, computed)
    _held, (x_at, dy_at, weight_at, bias_at) = addresses(x, dy, weight, bias)
    dx, rows, channels = empty_like(x), form.samples * form.groups, form.channels
    dweight = dbias = tables = work = None
    if wanted:
        dweight, dbias = torch.empty(channels, dtype=computed), torch.empty(channels, dtype=computed)
    if has_tables(form, cut, wanted):
        tables = torch.empty(2 * cut.chunks * channels, dtype=computed)
    if cut.work:
        work = torch.empty(cut.work + cut.coefficients, dtype=torch.float64)
    sums = (pointer(dweight), pointer(dbias))
    if tables is not None:
        sums = (tables.data_ptr(), tables.data_ptr() + tables.element_size() * cut.chunks * channels)
    mean, memory = saved.data_ptr(), pointer(work)
    context, dx_at = _Context.from_buffer_copy(template), dx.data_ptr()
    tensors = (x_at, 0, 0, dy_at, dx_at, 0, weight_at, bias_at, 0, 0)
    if dx_at % LINE:
        context[slots.STREAM] = False
    _ADDRESSES.pack_into(context, 0, *tensors, *sums, mean, mean + 8 * rows, memory, memory + 8 * cut.work)
    _launch(f"samples.{form.layout}.backward", x.dtype, activation, backward_launches(form, cut), context)
    if wanted and cut.chunks > 1:
        _add_chunks(sums, pointer(dweight), pointer(dbias), x.dtype, cut.chunks, channels)
    return dx, dweight, dbias


def _add_chunks(
    sums: tuple[int, int], dweight: int, dbias: int, dtype: torch.dtype, chunks: int, channels: int
) -> None:
    """Add the chunks' rows of both tables, in their order."""
    context = _Context()
    context[slots.WEIGHT], context[slots.BIAS] = dweight, dbias
    context[slots.DWEIGHT], context[slots.DBIAS] = sums
    context[slots.OUTER], context[slots.CHANNELS] = chunks, channels
    parallel_for(*total_launch(chunks, channels), kernel("samples.elementwise.total", dtype, None), context)
