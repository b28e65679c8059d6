"""The autograd functions that layer, RMS, group and instance normalization share, derived in docs/batch-norm.md.

`Plain` is made of torch operations and serves every transform of torch.func. `Kernel` runs the fast kernels; a backward
that must itself be differentiated is computed in plain operations again.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..axes import group_axes
from ..kernels.plain import samples as plain

# torch calls these methods by name and documents them: forward, setup_context, backward, jvp.
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
        ctx.save_for_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *plain.backward(dy, *ctx.saved_tensors, *ctx.settings), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: None) -> Tensor:
        x, weight, _bias = ctx.saved_tensors
        xhat, dy = plain.tangent(x, torch.zeros_like(x) if dx is None else dx, *ctx.settings)
        if weight is not None:
            dy = dy * weight
        if dweight is not None:
            dy = dy + xhat * dweight
        if dbias is not None:
            dy = dy + dbias
        return dy.to(x.dtype)


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
        ctx.call, ctx.form = call, form
        output: Tensor = y
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved = ctx.saved_tensors
        call: Call = ctx.call
        # Under vmap dy stands for many gradients at once, and has no memory to hand to a kernel.
        if torch.is_grad_enabled() or not torch._C._has_storage(dy):
            return *differentiable_backward(call, dy, x, weight, bias), None
        _, weight_wanted, bias_wanted, _ = ctx.needs_input_grad
        wanted = weight_wanted or bias_wanted
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        dx, dweight, dbias = call.kernels.backward(
            dy, x, ctx.form, weight, bias, saved, call.centre, call.activation, wanted
        )
        if wanted:
            dweight = _as(weight, dweight) if weight_wanted else None
            dbias = _as(bias, dbias) if bias_wanted else None
        return dx, dweight, dbias, None


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
