"""How the native part learns what to run: a cut planned and kernels compiled here, once for each kind of call.

A program is ``(slots, launches, work, tables, elements)``: the slots that do not change from call to call, launches of
``(address, tasks, grain, changes)``, float64 numbers of working memory, numbers of tables of sums, and elements of the
tensor. Tasks and order are those of `numba.channels.passes` and `numba.samples.passes`, so that every bit is the same.
"""

import struct

import torch

from .. import forms
from ..numba import processor, slots
from ..numba.channels import kernels as channel_kernels
from ..numba.channels.launch import ELEMENTS, launch_over_channels, launch_over_tensor
from ..numba.channels.plan import Plan, plan, plan_stored
from ..numba.compiled import Kernels
from ..numba.samples import kernels as sample_kernels
from ..numba.samples import passes
from ..numba.samples import slots as sample_slots

__all__ = ["KERNELS", "plan_channels", "plan_samples"]

# Which kernel stands at an address, of those that programs hold: name, element type, activation, residual.
KERNELS: dict[int, tuple[str, torch.dtype, str | None, bool]] = {}

_constants: dict[tuple[float, int, torch.dtype], torch.Tensor] = {}

Launch = tuple[int, int, int, tuple[tuple[int, int], ...]]
Program = tuple[tuple[int, ...], tuple[Launch, ...], int, int, int]


def plan_channels(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, activation: str | None, residual: bool, training: bool,
    backward: bool,
) -> tuple[Program, int] | Program | None:  # fmt: skip
    """Return the forward's program and the columns of its coefficients, or the backward's program.

    None where the processor has no kernel for the type: then Python serves the call.
    """
    if processor.unavailable(dtype):
        return None
    cut = (plan if training or backward else plan_stored)(shape, layout, dtype.itemsize)
    if backward:
        return _program(cut, _backward_launches(cut, dtype, activation, residual))
    return _program(cut, _forward_launches(cut, dtype, activation, residual, training)), cut.width


def _program(cut: Plan, launches: tuple[Launch, ...]) -> Program:
    held = [0] * slots.SIZE
    held[slots.OUTER : slots.OUTER + len(cut.sizes)] = map(int, cut.sizes)
    return tuple(held), launches, cut.partials + 5 * cut.width, 0, cut.outer * cut.inner * cut.channels


def _forward_launches(
    cut: Plan, dtype: torch.dtype, activation: str | None, residual: bool, training: bool
) -> tuple[Launch, ...]:
    if not training:
        return _over_channels("stored", cut, dtype), _over_tensor("apply", cut, dtype, activation, residual)
    if cut.fused:
        return (_over_tasks("forward", cut, dtype, activation, residual),)
    return (
        _over_tasks("partial", cut, dtype, None, False),
        _over_channels(f"{cut.layout}.finish", cut, dtype),
        _over_tensor("apply", cut, dtype, activation, residual),
    )


def _backward_launches(cut: Plan, dtype: torch.dtype, activation: str | None, residual: bool) -> tuple[Launch, ...]:
    if cut.fused:
        return (_over_tasks("backward", cut, dtype, activation, residual),)
    return (
        _over_channels("given", cut, dtype),
        _over_tasks("backward_partial", cut, dtype, activation, residual),
        _over_channels(f"{cut.layout}.finish_sums", cut, dtype),
        _over_tensor("apply_backward", cut, dtype, activation, residual),
    )


def _over_tasks(name: str, cut: Plan, dtype: torch.dtype, activation: str | None, residual: bool) -> Launch:
    return _channel_kernel(f"{cut.layout}.{name}", dtype, activation, residual), cut.tasks, cut.grain, ()


def _over_channels(name: str, cut: Plan, dtype: torch.dtype) -> Launch:
    return _channel_kernel(name, dtype, None, False), *launch_over_channels(name, cut), ()


def _over_tensor(name: str, cut: Plan, dtype: torch.dtype, activation: str | None, residual: bool) -> Launch:
    tasks, grain, blocks = launch_over_tensor(cut)
    return _channel_kernel(f"{cut.layout}.{name}", dtype, activation, residual), tasks, grain, ((slots.BLOCKS, blocks),)


def _channel_kernel(name: str, dtype: torch.dtype, activation: str | None, residual: bool) -> int:
    return _address(channel_kernels.KERNELS, name, dtype, activation, residual)


def _address(kernels: Kernels, name: str, dtype: torch.dtype, activation: str | None, residual: bool) -> int:
    """Return the address of a kernel, compiled on the way where it is not cached."""
    address = kernels.address(name, ELEMENTS[dtype], activation, residual)
    KERNELS[address] = (name, dtype, activation, residual)
    return address


def plan_samples(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, activation: str | None, centred: bool, trailing: bool,
    groups: int, part: int,
) -> tuple[Program, int, int, int] | tuple[Program, Program, int] | None:  # fmt: skip
    """Return the forward's program and its sizes (part 0), or the backward's without and with sums (1 and 2).

    None as for `plan_channels`.
    """
    if processor.unavailable(dtype):
        return None
    if trailing:
        form = forms.form_of_shape(torch.Size(shape), None, groups)
    else:
        form = forms.form_of_groups(torch.Size(shape), layout, groups)
    cut, wanted = passes.plan(form, dtype.itemsize), part == 2
    _, template = passes.prepared(form, dtype.itemsize, 0.0, centred, wanted)
    held = list(struct.unpack(f"{len(template) // 8}q", template))
    if form.layout == "elementwise":
        held[slots.WEIGHT], held[slots.BIAS] = (_address_of(value, form.channels, dtype) for value in (1.0, 0.0))
    forward = part == 0
    name = f"samples.{form.layout}.{'forward' if forward else 'backward'}"
    address = _address(sample_kernels.KERNELS, name, dtype, activation, False)
    steps = passes.forward_launches(form, cut) if forward else passes.backward_launches(form, cut)
    launches = tuple(
        (address, tasks, grain, ((sample_slots.STEP, step), (sample_slots.PARTS, parts)))
        for step, tasks, grain, parts in steps
    )
    work = cut.work + cut.coefficients if cut.work else 0
    elements = form.samples * form.channels * form.positions
    if forward:
        return (tuple(held), launches, work, 0, elements), form.samples * form.groups, form.channels, cut.work
    tables = 2 * cut.chunks * form.channels if passes.has_tables(form, cut, wanted) else 0
    total: Program = ((), (), 0, 0, 0)
    if wanted and cut.chunks > 1:
        sums = [0] * sample_slots.SIZE
        sums[slots.OUTER], sums[slots.CHANNELS] = cut.chunks, form.channels
        tasks, grain = passes.total_launch(cut.chunks, form.channels)
        adding = (_address(sample_kernels.KERNELS, "samples.elementwise.total", dtype, None, False), tasks, grain, ())
        total = (tuple(sums), (adding,), 0, 0, cut.chunks * form.channels)
    return (tuple(held), launches, work, tables, elements), total, cut.chunks


def _address_of(value: float, size: int, dtype: torch.dtype) -> int:
    """Return where ones or zeros stand for an absent weight or bias, for as long as the process lives."""
    computed = torch.float64 if dtype is torch.float64 else torch.float32
    key = (value, size, computed)
    if key not in _constants:
        _constants[key] = torch.full((size,), value, dtype=computed)
    return _constants[key].data_ptr()
