"""The four steps of batch normalization apart, on the quickest kernels that can serve the input.

    statistics -> apply           forward
    reduce     -> apply_backward  backward

What puts something between two steps stands on them: synchronised normalization adds up statistics and sums over
processes, ghost normalization takes them over parts of a batch, micro-batched over several. A graph that autograd
records does not see into them; forward mode and the transforms of torch.func do. x, y, dy and dx are ``(N, C, *)``;
mean, var, rstd and every sum are ``(C,)`` float64, and weight and bias ``(C,)`` as for
:func:`normkit.functional.batch_norm`.

Conventions:
    Axes averaged: all but dimension 1. Variance: biased, divisor m, the values per channel.
    ``rstd = 1 / sqrt(var + eps)``: eps is the caller's to add.
    Accumulation: as for :func:`normkit.functional.batch_norm`.

Algorithm and section below are those of Ioffe and Szegedy, 2015, arXiv:1502.03167.

Inside `normkit.use_backend` the named implementation runs, or the call raises BackendError.

Example:
    The backward of a batch that two processes hold half of each, on one machine::

        >>> import torch
        >>> x, dy = torch.randn(8, 3, 5), torch.randn(8, 3, 5)
        >>> mean, var = statistics(x)
        >>> rstd = (var + 1e-5).rsqrt()
        >>> halves = [reduce(dy[part], x[part], mean, rstd) for part in (slice(4), slice(4, 8))]
        >>> total, along = halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]
        >>> dx = apply_backward(dy[:4], x[:4], mean, rstd, None, (total, along), count=40)
        >>> tuple(dx.shape)
        (4, 3, 5)
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..kernels import dispatch
from ..kernels.dispatch import Activation
from ..kernels.layouts import contiguous_layout, lay_out
from ..kernels.plain import channels as plain_channels
from . import checks
from .transforms import is_forward_mode

__all__ = ["apply", "apply_backward", "reduce", "statistics"]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel (Algorithm 1).

    Raises:
        ShapeError: fewer than two dimensions, no channels or no values.
        DtypeError: integers, complex numbers or a sparse tensor.
    """
    steps, (x,) = _serve(x)
    found: tuple[Tensor, Tensor] = steps.statistics(x)
    return found


def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return ``activation((x - mean) * rstd * weight + bias + residual)``, in the type and memory format of x.

    Raises:
        ShapeError: as for `statistics`, a value per channel of another size, or a residual that does not match x.
        DtypeError: as for `statistics`.
        ArgumentError: an unknown activation.
    """
    checks.check_activation(activation, None)
    steps, large = _serve(x, residual, "residual", mean=mean, rstd=rstd, weight=weight, bias=bias)
    if steps is plain_channels:
        y = plain_channels.apply(large[0], mean, rstd, weight, bias)
        return plain_channels.activate(y if residual is None else y + large[1], activation)
    z: Tensor = steps.apply(large[0], mean, rstd, weight, bias, activation, None if residual is None else large[1])
    return z


def reduce(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two sums of the backward per channel: of dy, and of dy times the normalized x (section 3).

    They are dbias and dweight.

    Raises:
        ShapeError: as for `apply`, or dy of another shape than x.
        DtypeError: as for `statistics`.
    """
    steps, (x, dy) = _serve(x, dy, "dy", mean=mean, rstd=rstd)
    sums: tuple[Tensor, Tensor] = steps.reduce(dy, x, mean, rstd)
    return sums


def apply_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, sums: tuple[Tensor, Tensor], count: int
) -> Tensor:
    """Return ``dx = weight * rstd * (dy - sums[0] / count - xhat * sums[1] / count)`` (section 3).

    Args:
        dy: the gradient of y.
        x: the input.
        mean: the statistics that x was normalized with.
        rstd: likewise.
        weight: ``(C,)`` or None for 1.
        sums: what `reduce` found, added up over all that share the statistics.
        count: m, the values per channel that share the statistics.

    Returns:
        dx, in the type and memory format of x.

    Raises:
        ShapeError: as for `reduce`.
        DtypeError: as for `statistics`.
    """
    steps, (x, dy) = _serve(x, dy, "dy", mean=mean, rstd=rstd, weight=weight, sum_dy=sums[0], sum_dy_xhat=sums[1])
    dx: Tensor = steps.apply_backward(dy, x, mean, rstd, weight, sums, count)
    return dx


def _serve(
    x: Tensor, other: Tensor | None = None, role: str = "", **per_channel: Tensor | None
) -> tuple[Any, list[Tensor]]:
    """Check the arguments; return the module that serves the call, and the large tensors as it wants them laid out."""
    checks.check_input(x, None)
    if x.dim() < 2 or x.numel() == 0:
        raise ShapeError(f"expected (N, C) or (N, C, *) with values, got {tuple(x.shape)}")
    for name, values in per_channel.items():
        if values is not None and values.shape != x.shape[1:2]:
            raise ShapeError(f"{name} must hold {x.shape[1]} numbers, one per channel; got {tuple(values.shape)}")
    # The kernels are steps of a forward and a backward that the caller writes; torch.func differentiates operations.
    followed = is_forward_mode() or torch._C._are_functorch_transforms_active()
    large = [x if followed else x.detach()]
    if other is not None:
        checks.check_input(other, None)
        if other.shape != x.shape or other.dtype != x.dtype:
            raise ShapeError(f"{role} must match x, {tuple(x.shape)} {x.dtype}; got {tuple(other.shape)} {other.dtype}")
        large.append(other if followed else other.detach())
    if dispatch.choose(x) != "numba":
        return plain_channels, large
    from ..kernels.numba.channels import step_calls
    from ..kernels.numba.channels.plan import layout_of

    layout = layout_of(x) or contiguous_layout(x)
    return step_calls, [lay_out(tensor, layout) for tensor in large]
