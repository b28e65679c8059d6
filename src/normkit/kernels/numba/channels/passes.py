"""Normalization per channel on a CPU: Numba kernels on torch's threads, for both memory layouts.

Statistics gather in float32 lanes over at most 2048 values about one of them, and merge in float64 in a fixed order:
results are the same in every bit for any number of threads, because the work is cut by shape alone. Half precision is
widened to float32 as it is read; float64 computes in float64.

`forward`, `inference` and `backward` are the fused wholes; their steps stand apart in `step_calls`. Tensors come
checked, dense and in the layout that `layout_of` names.
"""

import torch
from torch import Tensor

from ...memory import empty_like
from ..arguments import INVERTED_LEAKY_RELU
from .launch import (
    SLOTS,
    addresses,
    check_apart,
    computed,
    computed_type,
    pointer,
    prepare,
    run_over_channels,
    run_over_tensor,
    run_tasks,
)
from .plan import layout_of, plan, plan_stored

__all__ = ["backward", "forward", "inference", "layout_of", "plan"]


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
    place. Returns y, and what the backward needs: mean and rstd of every channel, 2 * C float64.
    """
    cut = plan(x.shape, layout, x.element_size())
    wide = computed_type(x)
    _held, (x_at, residual_at, weight_at, bias_at) = addresses(
        x, residual, computed(weight, wide), computed(bias, wide)
    )
    y = empty_like(x) if out is None else out
    y_at, mean_at, var_at = y.data_ptr(), pointer(running_mean), pointer(running_var)
    if running_mean is not None:
        size = cut.channels * (8 if wide is torch.float64 else 4)
        check_apart(size, mean_at, var_at, weight_at, bias_at, x_at, residual_at, x.nbytes)
    saved = torch.empty(2 * cut.channels, dtype=torch.float64)
    mean = saved.data_ptr()
    rstd = mean + 8 * cut.channels
    context, _memory, partials, coefficients = prepare(cut)
    tensors = (x_at, y_at, residual_at, 0, 0, 0, weight_at, bias_at)
    state = (mean_at, var_at, 0, 0, mean, rstd, partials, coefficients)
    sizes = cut.sizes_at(y_at) if cut.stream else cut.sizes
    SLOTS.pack_into(context, 0, *tensors, *state, *sizes, eps, momentum, unbiased, False, False, 0)
    if cut.fused:
        run_tasks("forward", x, cut, activation, residual is not None, context)
    else:
        run_tasks("partial", x, cut, None, False, context)
        run_over_channels(f"{cut.layout}.finish", x, cut, context)
        run_over_tensor("apply", x, cut, activation, residual is not None, context)
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
    cut = plan_stored(x.shape, layout, x.element_size())
    wide = computed_type(x)
    _held, (x_at, residual_at, *parameters) = addresses(x, residual, computed(weight, wide), computed(bias, wide))
    stored = computed(running_mean, wide)
    assert stored is not None
    _stored, (mean_at, var_at, _, _) = addresses(stored, computed(running_var, wide))
    y = empty_like(x) if out is None else out
    y_at = y.data_ptr()
    saved = torch.empty(2 * cut.channels, dtype=torch.float64)
    mean = saved.data_ptr()
    rstd = mean + 8 * cut.channels
    context, _memory, _, coefficients = prepare(cut)
    pointers = (x_at, y_at, residual_at, 0, 0, 0, *parameters, mean_at, var_at)
    state = (0, 0, mean, rstd, 0, coefficients)
    sizes = cut.sizes_at(y_at) if cut.stream else cut.sizes
    SLOTS.pack_into(context, 0, *pointers, *state, *sizes, eps, 0.0, False, False, False, 0)
    run_over_channels("stored", x, cut, context)
    run_over_tensor("apply", x, cut, activation, residual is not None, context)
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
    inverted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dx, dweight, dbias and the gradient of the residual.

    ``saved`` is what the forward returned, and is only read. With residual and activation ``other`` decides the slope:
    the output for relu, relu6 and leaky_relu, the residual for silu. ``frozen`` says that the statistics were
    constants, ``inverted`` that the forward wrote its output over the input: x is that output, from which the
    normalized input is had back.
    The activation is then None or leaky_relu, and there is no residual.
    """
    cut = plan(x.shape, layout, x.element_size())
    wide = computed_type(x)
    weight, bias = computed(weight, wide), computed(bias, wide)
    dx = empty_like(x)
    context, _memory, partials, coefficients = prepare(cut)
    if inverted:
        other, activation = x, INVERTED_LEAKY_RELU if activation else None
    _held, (x_at, other_at, dy_at, weight_at) = addresses(x, other, dy, weight)
    _shift, (bias_at, _, _, _) = ((), (0, 0, 0, 0)) if bias is None else addresses(bias)
    dresidual = None
    if residual:
        dresidual = dy if activation is None else empty_like(x)
    # Like another tensor, a tensor is made in two thirds of the time.
    dweight = torch.empty(cut.channels, dtype=wide) if weight is None else torch.empty_like(weight)
    dbias = torch.empty_like(dweight)
    mean = saved.data_ptr()
    rstd = mean + 8 * cut.channels
    dx_at, dresidual_at = dx.data_ptr(), pointer(dresidual) if dresidual is not dy else 0
    tensors = (x_at, 0, other_at, dy_at, dx_at, dresidual_at, weight_at)
    state = (bias_at, 0, 0, dweight.data_ptr(), dbias.data_ptr(), mean, rstd, partials, coefficients)
    sizes = cut.sizes_at(dx_at | dresidual_at) if cut.stream else cut.sizes
    SLOTS.pack_into(context, 0, *tensors, *state, *sizes, 0.0, 0.0, False, frozen, inverted, 0)
    if cut.fused:
        run_tasks("backward", x, cut, activation, residual, context)
    else:
        run_over_channels("given", x, cut, context)
        run_tasks("backward_partial", x, cut, activation, residual, context)
        run_over_channels(f"{cut.layout}.finish_sums", x, cut, context)
        run_over_tensor("apply_backward", x, cut, activation, residual, context)
    return dx, dweight, dbias, dresidual
