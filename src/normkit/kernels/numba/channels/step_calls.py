"""The four steps of batch normalization on a CPU, apart, with the signatures of `plain_channels`.

    statistics -> apply          forward
    reduce     -> apply_backward  backward

Synchronised, ghost and micro-batched normalization put something between two steps. The kernels are those of
`passes` for tensors whose work is cut into blocks, with the same numerics. Tensors come checked and dense;
mean, var, rstd and every sum are (C,) float64. Algorithm and section are those of
Ioffe and Szegedy, 2015, arXiv:1502.03167.
"""

import torch
from torch import Tensor

from ...memory import empty_like
from .launch import (
    SLOTS,
    Context,
    addresses,
    computed,
    computed_type,
    pointer,
    run_over_channels,
    run_over_tensor,
    run_tasks,
    working_memory,
)
from .plan import Plan, layout_of, plan

__all__ = ["apply", "apply_backward", "reduce", "statistics"]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel (Algorithm 1)."""
    cut = _plan(x)
    blocks, channel = working_memory(cut), _ChannelMemory(cut)
    mean, var = (torch.empty(cut.channels, dtype=torch.float64, device="cpu") for _ in range(2))
    _held, (x_at, *_) = addresses(x)
    context = Context()
    state = (0, 0, 0, 0, mean.data_ptr(), channel.rstd, pointer(blocks), channel.coefficients)
    # eps only enters rstd, which is dropped: 1 keeps a constant channel's finite.
    SLOTS.pack_into(context, 0, x_at, *(0,) * 7, *state, *cut.sizes, 1.0, 0.0, False, False, False, var.data_ptr())
    run_tasks("partial", x, cut, None, False, context)
    run_over_channels(f"{cut.layout}.finish", x, cut, context)
    return mean, var


def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return ``activation((x - mean) * rstd * weight + bias + residual)`` in the type and layout of x."""
    cut, wide = _plan(x), computed_type(x)
    _held, (x_at, residual_at, weight_at, bias_at) = addresses(
        x, residual, computed(weight, wide), computed(bias, wide)
    )
    _given, (mean_at, rstd_at, *_) = addresses(_double(mean), _double(rstd))
    y, channel = empty_like(x), _ChannelMemory(cut)
    y_at, context = y.data_ptr(), Context()
    tensors = (x_at, y_at, residual_at, 0, 0, 0, weight_at, bias_at)
    state = (0, 0, 0, 0, mean_at, rstd_at, 0, channel.coefficients)
    SLOTS.pack_into(context, 0, *tensors, *state, *cut.sizes_at(y_at), 0.0, 0.0, False, False, False, 0)
    run_over_channels("given", x, cut, context)
    run_over_tensor("apply", x, cut, activation, residual is not None, context)
    return y


def reduce(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two sums of the backward: of dy, and of dy times the normalized x."""
    cut = _plan(x)
    blocks, channel = working_memory(cut), _ChannelMemory(cut)
    _held, (x_at, dy_at, *statistics) = addresses(x, dy, _double(mean), _double(rstd))
    sums = torch.empty((2, cut.channels), dtype=torch.float64, device="cpu")
    context = Context()
    slots = (x_at, 0, 0, dy_at, *(0,) * 8, *statistics, pointer(blocks), channel.coefficients)
    SLOTS.pack_into(context, 0, *slots, *cut.sizes, 0.0, 0.0, False, True, False, sums.data_ptr())
    run_over_channels("given", x, cut, context)
    run_tasks("backward_partial", x, cut, None, False, context)
    run_over_channels(f"{cut.layout}.finish_sums", x, cut, context)
    return sums[0], sums[1]


def apply_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, sums: tuple[Tensor, Tensor], count: int
) -> Tensor:
    """Return dx = weight * rstd * (dy - sum_dy / m - xhat * sum_dy_xhat / m), ``count`` is m (section 3)."""
    cut, wide = _plan(x), computed_type(x)
    _held, (x_at, dy_at, weight_at, _) = addresses(x, dy, computed(weight, wide))
    _given, (mean_at, rstd_at, both_at, _) = addresses(_double(mean), _double(rstd), _double(torch.stack(sums)))
    dx, channel = empty_like(x), _ChannelMemory(cut)
    dx_at, context = dx.data_ptr(), Context()
    slots = (x_at, 0, 0, dy_at, dx_at, 0, weight_at, *(0,) * 5, mean_at, rstd_at, 0, channel.coefficients)
    sizes = (*cut.sizes_at(dx_at)[:-1], count)
    SLOTS.pack_into(context, 0, *slots, *sizes, 0.0, 0.0, False, False, False, both_at)
    run_over_channels("given", x, cut, context)
    run_over_channels("given_sums", x, cut, context)
    run_over_tensor("apply_backward", x, cut, None, False, context)
    return dx


class _ChannelMemory:
    """Working memory of one number per channel: an rstd nobody asked for, and the coefficients."""

    def __init__(self, cut: Plan) -> None:
        self.memory = torch.empty(cut.channels + 5 * cut.width, dtype=torch.float64, device="cpu")
        self.rstd = self.memory.data_ptr()
        self.coefficients = self.rstd + 8 * cut.channels


def _plan(x: Tensor) -> Plan:
    layout = layout_of(x)
    assert layout is not None
    return plan(tuple(x.shape), layout, x.element_size(), stepwise=True)


def _double(values: Tensor) -> Tensor:
    return values.detach().to(torch.float64).contiguous()
