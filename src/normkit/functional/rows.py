"""The differentiable step that layer, RMS, group and instance normalization share: normalize a view over its axes."""

from typing import Any

import torch
from torch import Tensor

from ..kernels import plain_rows as plain

__all__ = ["normalize"]


class _Rows(torch.autograd.Function):
    """Forward and backward of ``normalize``, following SPEC A1 and A3 with other axes."""

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


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: tuple[int, ...], eps: float, *, centre: bool = True
) -> Tensor:
    """Normalize x over the axes, then scale and shift.

    Args:
        x: the view in which ``axes`` share statistics.
        weight: broadcasts against x; None for 1.
        bias: broadcasts against x; None for 0.
        axes: the averaged axes.
        eps: added to the variance, or to the mean square.
        centre: whether the mean is removed.

    Returns:
        The normalized view, in the type and memory format of x.
    """
    if x.numel() == 0 or torch.compiler.is_compiling():
        return plain.forward(x, weight, bias, axes, eps, centre)
    y: Tensor = _Rows.apply(x, weight, bias, axes, eps, centre)
    return y
