"""The autograd functions that layer, RMS, group and instance normalization share, derived in docs/batch-norm.md.

`Plain` is made of torch operations and serves every transform of torch.func in reverse mode. `Kernel` runs the fast
kernels; a backward that must itself be differentiated is computed in plain operations again. In forward mode neither
runs, but the operations themselves: see `transforms`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..axes import group_axes
from ..kernels.forms import form_of_groups, form_of_shape
from ..kernels.native import calls as native
from ..kernels.plain import samples as plain
from ..kernels.saved import are_as_saved, is_hooked, restore, restore_statistics, restore_values
from .transforms import must_be_followed

# torch calls these methods by name and documents them: forward, setup_context, backward.
# ruff: noqa: D102

__all__ = ["Call", "Kernel", "Plain"]


class Plain(torch.autograd.Function):
    """Forward and backward of a view over its axes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: tuple[int, ...], eps: float, centre: bool
    ) -> Tensor:
        return plain.forward(x, weight, bias, axes, eps, centre)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, *ctx.settings = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        return *plain.backward(dy, restore("input", x, dy), weight, bias, *ctx.settings), None, None, None


@dataclass(frozen=True, slots=True)
class Call:
    """What a call is besides its tensors.

    Attributes:
        kernels: the module that serves it, `kernels.numba.samples.passes` or its twin for GPUs.
        groups: of ``(N, C, *)``; None where the last dimensions are normalized.
        trailing: how many dimensions that is, or 0.
        eps: added to the variance, or to the mean square.
        centre: whether the mean is removed.
        activation: applied last, or None.
    """

    kernels: Any
    groups: int | None
    trailing: int
    eps: float
    centre: bool
    activation: str | None

    def form(self, x: Tensor) -> Any:
        """Return how the kernels see x, or None where it lies in memory as they cannot read it."""
        if self.groups is not None:
            return self.kernels.form_of(x, self.groups)
        return self.kernels.form_of_rows(x, self.trailing)


class Kernel(torch.autograd.Function):
    """The fast kernels. They save the input, mean and rstd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        job: tuple[Call, Any, Tensor | None, list[tuple[Tensor, Tensor]] | None],
    ) -> Tensor:
        # One argument for all that is no tensor: torch looks at each.
        call, form, variance, kept = job
        y, saved = call.kernels.forward(x, form, weight, bias, call.eps, call.centre, call.activation, variance)
        if kept is not None and variance is not None:
            kept.append((saved[0], variance))
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.call, ctx.form, ctx.strides, ctx.hooked = call, form, x.stride(), is_hooked()
        output: Tensor = y
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, weight_wanted, bias_wanted, _ = ctx.needs_input_grad
        memory = (ctx.strides, ctx.hooked)
        return *gradients_of(ctx.call, ctx.form, memory, dy, ctx.saved_tensors, weight_wanted, bias_wanted), None


def gradients_of(
    call: Call,
    form: Any,
    memory: tuple[tuple[int, ...], bool],
    dy: Tensor,
    saved_tensors: tuple[Tensor | None, ...],
    weight_wanted: bool,
    bias_wanted: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias from what the forward saved.

    ``memory`` is the strides of x as it was saved, and whether a hook may have changed any of the saved tensors.
    """
    x, weight, bias, saved = saved_tensors
    assert x is not None
    assert saved is not None
    (strides, hooked), followed = memory, must_be_followed(dy)
    if not followed and dy.stride() != strides:
        dy = torch.empty_strided(dy.shape, strides, dtype=dy.dtype, device=dy.device).copy_(dy)
    sizes = (form.channels, 2 * form.samples * form.groups)
    if followed or hooked or not are_as_saved(dy, strides, sizes, x, weight, bias, saved):
        x, saved = restore("input", x, dy), restore_statistics(saved, sizes[1], dy)
        weight, bias = (restore_values("parameter", value, form.channels, dy) for value in (weight, bias))
        if not followed and x.stride() != strides:
            x = torch.empty_like(dy).copy_(x)
    if followed:
        return differentiable_backward(call, dy, x, weight, bias)
    wanted = weight_wanted or bias_wanted
    dx, dweight, dbias = call.kernels.backward(dy, x, form, weight, bias, saved, call.centre, call.activation, wanted)
    if wanted:
        dweight = _as(weight, dweight) if weight_wanted else None
        dbias = _as(bias, dbias) if bias_wanted else None
    return dx, dweight, dbias


def backward_of_native(
    dy: Tensor,
    saved_tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    layout: str,
    trailing: bool,
    groups: int,
    activation: str | None,
    centred: bool,
    eps: float,
    wanted: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients that a native node leaves to Python: to be differentiated again, mapped, or laid out."""
    from ..kernels.numba.samples import passes

    settings = (eps, centred, activation)
    if trailing:
        call, form = Call(passes, None, groups, *settings), form_of_shape(dy.shape, None, groups)
    else:
        call, form = Call(passes, groups, 0, *settings), form_of_groups(dy.shape, layout, groups)
    return gradients_of(call, form, (strides, True), dy, saved_tensors, wanted, wanted)


native.connect("samples", backward_of_native)


def differentiable_backward(
    call: Call, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dx, dweight and dbias in operations that autograd can follow again."""
    if call.groups is None:
        axes = tuple(range(x.dim() - call.trailing, x.dim()))
        return plain.backward(dy, x, weight, bias, axes, call.eps, call.centre, call.activation)
    # reshape, and not unflatten: this one torch can do for many gradients at once.
    split = (x.shape[0], call.groups, x.shape[1] // call.groups, *x.shape[2:])
    broadcast = (1, *split[1:3], *(1 for _ in split[3:]))
    gamma, beta = (None if value is None else value.reshape(broadcast) for value in (weight, bias))
    dx, dweight, dbias = plain.backward(
        dy.reshape(split), x.reshape(split), gamma, beta, group_axes(x.dim()), call.eps, call.centre, call.activation
    )
    dweight, dbias = (None if value is None else value.reshape(-1) for value in (dweight, dbias))
    return dx.reshape(x.shape), dweight, dbias


def _as(parameter: Tensor | None, gradient: Tensor) -> Tensor | None:
    if parameter is None:
        return None
    if gradient.shape != parameter.shape:
        gradient = gradient.reshape(parameter.shape)
    return gradient if gradient.dtype is parameter.dtype else gradient.to(parameter.dtype)
