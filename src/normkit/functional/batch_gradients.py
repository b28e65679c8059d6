"""The autograd functions of batch normalization: forward and backward.

They follow Ioffe and Szegedy, 2015, arXiv:1502.03167. `Training` and `Inference` are made of plain torch operations and
serve every transform of torch.func in reverse mode. `Kernel` runs the fast kernels; a backward that must itself be
differentiated is computed in plain operations again. In forward mode none of them runs, but the operations themselves:
see `transforms`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..axes import values_per_channel
from ..errors import ArgumentError
from ..kernels.layouts import contiguous_layout, holds_values, lay_out
from ..kernels.native import calls as native
from ..kernels.plain import channels as plain
from ..kernels.saved import are_as_saved, is_hooked, restore, restore_statistics, restore_values
from .checks import check_saveable
from .inplace import is_recorded
from .transforms import must_be_followed

# torch calls these methods by name and documents them: forward, setup_context, backward.
# ruff: noqa: D102

__all__ = ["Call", "Inference", "Training", "run_kernel"]


class Training(torch.autograd.Function):
    """The training forward and its backward, following its Algorithm 1 and section 3."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return plain.forward(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, eps = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        x, weight, bias, mean, var = ctx.saved_tensors
        x = restore("input", x, dy)
        if torch.is_grad_enabled():
            dx, dweight, dbias = plain.backward(dy, x, weight, ctx.eps)
        else:
            rstd = (var + ctx.eps).rsqrt()
            dbias, dweight = sums = plain.reduce(dy, x, mean, rstd)
            dx = plain.apply_backward(dy, x, mean, rstd, weight, sums, values_per_channel(tuple(x.shape)))
        return dx, _as(weight, dweight), _as(bias, dbias), None


class Inference(torch.autograd.Function):
    """The forward with stored statistics, which are constants to the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        return plain.apply(x, mean, (var.double() + eps).rsqrt(), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, mean, var, eps = inputs
        # The stored statistics are saved as tensors, so that autograd notices a change before the backward.
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        x = restore("input", x, dy)
        rstd = (var.detach().double() + ctx.eps).rsqrt()
        dx, dweight, dbias = plain.inference_backward(dy, x, mean.detach(), rstd, weight)
        return dx, _as(weight, dweight), _as(bias, dbias), None, None, None


@dataclass(frozen=True, slots=True)
class Call:
    """What a call is besides its tensors.

    Attributes:
        kernels: the module that serves it, `kernels.numba.channels.passes` or its twin for GPUs.
        training: the statistics are the batch's.
        momentum: the weight of the new batch, already a number.
        eps: added to the variance.
        unbiased: which variance is stored.
        activation: applied last, or None.
        inplace: y is written over x.
    """

    kernels: Any
    training: bool
    momentum: float
    eps: float
    unbiased: bool
    activation: str | None
    inplace: bool


class Kernel(torch.autograd.Function):
    """The fast kernels: forward with the running update, and backward, with activation and residual in the same loops.

    It saves the input, mean and rstd. With a residual the activation's slope needs one tensor more, which exists
    anyway: the output where its sign decides, else the residual.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        job: tuple[Call, str],
    ) -> Tensor:
        # One argument for all that is no tensor: torch looks at each.
        call, layout = job
        y, saved = compute(x, layout, weight, bias, residual, running_mean, running_var, call)
        if call.inplace:
            ctx.mark_dirty(x)
            # What the backward finds in the place of the input is the output.
            assert y is x
        other = None
        if residual is not None and call.activation is not None:
            other = y if call.activation in plain.GATED_BY_OUTPUT else residual
        # Stored statistics are saved as tensors, so that autograd notices a change before the backward.
        held = (None, None) if call.training else (running_mean, running_var)
        ctx.save_for_backward(x, weight, bias, saved, other, *held)
        ctx.layout, ctx.strides, ctx.channels, ctx.hooked = layout, x.stride(), x.shape[1], is_hooked()
        ctx.call, ctx.has_residual = call, residual is not None
        output: Tensor = y
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        memory = (ctx.layout, ctx.strides, ctx.channels, ctx.hooked)
        return *gradients_of(ctx.call, memory, dy, ctx.saved_tensors, ctx.has_residual), None, None, None


def gradients_of(
    call: Call,
    memory: tuple[str, tuple[int, ...], int, bool],
    dy: Tensor,
    saved_tensors: tuple[Tensor | None, ...],
    has_residual: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and residual from what the forward saved.

    ``memory`` is of x as it was saved: layout, strides, channels; and whether a hook may have changed what was saved.
    """
    x, weight, bias, saved, other, running_mean, running_var = saved_tensors
    assert x is not None
    assert saved is not None
    (layout, strides, channels, hooked), followed = memory, must_be_followed(dy)
    if not followed and dy.stride() != strides:
        dy = lay_out(dy, layout)
    sizes = (channels, 2 * channels)
    if followed or hooked or not are_as_saved(dy, strides, sizes, x, weight, bias, saved, other):
        wanted = None if followed else layout
        x, saved = restore("input", x, dy, wanted), restore_statistics(saved, 2 * channels, dy)
        weight, bias = (restore_values("parameter", value, channels, dy) for value in (weight, bias))
        other = None if other is None else restore("residual or output", other, dy, wanted)
        running_mean, running_var = (
            restore_values("running statistics", value, channels, dy) for value in (running_mean, running_var)
        )
    if call.inplace:
        return backward_in_place(call, layout, dy, x, weight, bias, saved, followed)
    if followed:
        gradients = differentiable_backward(call, dy, x, weight, bias, other, running_mean, running_var)
    else:
        gradients = call.kernels.backward(
            dy, x, layout, weight, bias, saved, call.activation, other, has_residual, not call.training
        )
    dx, dweight, dbias, dresidual = gradients
    return dx, _as(weight, dweight), _as(bias, dbias), dresidual if has_residual else None


def backward_of_native(
    dy: Tensor,
    saved_tensors: tuple[Tensor | None, ...],
    last: bool,
    activation: str | None,
    has_residual: bool,
    training: bool,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Return the gradients that a native node leaves to Python: to be differentiated again, mapped, or laid out."""
    from ..kernels.numba.channels import passes

    call = Call(passes, training, 0.0, eps, True, activation, False)
    memory = ("channels_last" if last else "contiguous", (), dy.shape[1], True)  # all is looked at and laid out
    return gradients_of(call, memory, dy, saved_tensors, has_residual)


def backward_in_place(
    call: Call,
    layout: str,
    dy: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    followed: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients from the output alone."""
    if followed:
        raise ArgumentError(
            "the backward of batch_norm with inplace=True cannot itself be differentiated, in reverse or in forward "
            "mode, or mapped, for the input is gone; leave inplace out of the call"
        )
    frozen = not call.training
    gradients = call.kernels.backward(dy, y, layout, weight, bias, saved, call.activation, frozen=frozen, inverted=True)
    dx, dweight, dbias, _ = gradients
    return dx, _as(weight, dweight), _as(bias, dbias), None


def compute(
    x: Tensor,
    layout: str,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Run the kernel on tensors that lie in this layout; return y and what was saved."""
    kernels = call.kernels
    settings = (call.activation, residual, x if call.inplace and holds_values(x) else None)
    if call.training:
        running = (running_mean, running_var, call.momentum)
        found: tuple[Tensor, Tensor] = kernels.forward(
            x, layout, weight, bias, *running, call.eps, call.unbiased, *settings
        )
    else:
        found = kernels.inference(x, layout, weight, bias, running_mean, running_var, call.eps, *settings)
    return found


def run_kernel(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    call: Call,
) -> Tensor:
    """Run the kernel, under autograd only where a gradient is recorded: on a small tensor autograd costs the most."""
    # Copied where autograd sees it: a copy made inside would cut the double backward off from x.
    given, layout = x, call.kernels.layout_of(x)
    if layout is None:
        layout = contiguous_layout(x)
        x = lay_out(x, layout)
    if residual is not None:
        residual = lay_out(residual, layout)
    if is_recorded(x, weight, bias, residual):
        if (
            x.is_inference()
            or (weight is not None and weight.is_inference())
            or (bias is not None and bias.is_inference())
            or (residual is not None and residual.is_inference())
        ):
            # Before the kernel moves the running statistics: torch would refuse it afterwards.
            check_saveable(input=x, weight=weight, bias=bias, residual=residual)
        y: Tensor = Kernel.apply(x, weight, bias, residual, running_mean, running_var, (call, layout))
        return y
    y, _ = compute(x, layout, weight, bias, residual, running_mean, running_var, call)
    if call.inplace:
        if y is not given:
            return given.copy_(y)
        increment_version(given)
    return y


def differentiable_backward(
    call: Call,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and the residual's gradient in operations that autograd can follow again."""
    if call.training:
        mean, var = plain.statistics(x)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var.double()
    rstd = (var + call.eps).rsqrt()
    dz = plain.gradient_before(dy, x, mean, rstd, weight, bias, call.activation, other)
    if call.training:
        return *plain.backward(dz, x, weight, call.eps), dz
    return *plain.inference_backward(dz, x, mean, rstd, weight), dz


def _as(parameter: Tensor | None, gradient: Tensor) -> Tensor | None:
    if parameter is None or gradient.dtype is parameter.dtype:
        return None if parameter is None else gradient
    return gradient.to(parameter.dtype)


native.connect("channels", backward_of_native)
