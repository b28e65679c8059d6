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
    Context,
    computed,
    computed_type,
    pointer,
    run_over_channels,
    run_over_tensor,
    run_tasks,
    working_memory,
)
from .plan import Plan, layout_of, plan

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
    place. Returns y, and what the backward needs: mean, rstd and the coefficients of every channel.
    """
    cut = plan(tuple(x.shape), layout, x.element_size())
    wide = computed_type(x)
    weight, bias = computed(weight, wide), computed(bias, wide)
    y, partials = empty_like(x) if out is None else out, working_memory(cut)
    saved = torch.empty(2 * cut.channels + 5 * cut.width, dtype=torch.float64)
    mean, one = saved.data_ptr(), 8 * cut.channels
    tensors = (x.data_ptr(), y.data_ptr(), pointer(residual), 0, 0, 0, pointer(weight), pointer(bias))
    state = (pointer(running_mean), pointer(running_var), 0, 0, mean, mean + one, pointer(partials))
    context = Context()
    SLOTS.pack_into(context, 0, *tensors, *state, mean + 2 * one, *cut.sizes, eps, momentum, unbiased, False, False, 0)
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
    cut = plan(tuple(x.shape), layout, x.element_size())
    wide = computed_type(x)
    y = empty_like(x) if out is None else out
    held = [computed(value, wide) for value in (weight, bias, running_mean, running_var)]
    saved = torch.empty(2 * cut.channels + 5 * cut.width, dtype=torch.float64)
    mean, one = saved.data_ptr(), 8 * cut.channels
    pointers = (x.data_ptr(), y.data_ptr(), pointer(residual), 0, 0, 0, *map(pointer, held))
    context = Context()
    SLOTS.pack_into(
        context, 0, *pointers, 0, 0, mean, mean + one, 0, mean + 2 * one, *cut.sizes, eps, 0.0, False, False, False, 0
    )
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

    ``saved`` is what the forward returned. With residual and activation ``other`` decides the slope: the output for
    relu, relu6 and leaky_relu, the residual for silu. ``frozen`` says that the statistics were constants, ``inverted``
    that the forward wrote its output over the input: x is that output, from which the normalized input is had back.
    The activation is then None or leaky_relu, and there is no residual.
    """
    cut = plan(tuple(x.shape), layout, x.element_size())
    wide = computed_type(x)
    weight = computed(weight, wide)
    dx, partials = empty_like(x), working_memory(cut)
    if inverted:
        saved = _centred_on_bias(saved, bias, cut, wide)
        other, activation = x, INVERTED_LEAKY_RELU if activation else None
    dresidual = None
    if residual:
        dresidual = dy if activation is None else empty_like(x)
    dweight, dbias = torch.empty(cut.channels, dtype=wide), torch.empty(cut.channels, dtype=wide)
    mean, one = saved.data_ptr(), 8 * cut.channels
    tensors = (x.data_ptr(), 0, pointer(other), dy.data_ptr(), dx.data_ptr(), pointer(dresidual), pointer(weight))
    state = (0, 0, 0, dweight.data_ptr(), dbias.data_ptr(), mean, mean + one, pointer(partials), mean + 2 * one)
    context = Context()
    SLOTS.pack_into(context, 0, *tensors, *state, *cut.sizes, 0.0, 0.0, False, frozen, inverted, 0)
    if cut.fused:
        run_tasks("backward", x, cut, activation, residual, context)
    else:
        run_tasks("backward_partial", x, cut, activation, residual, context)
        run_over_channels(f"{cut.layout}.finish_sums", x, cut, context)
        run_over_tensor("apply_backward", x, cut, activation, residual, context)
    return dx, dweight, dbias, dresidual


def _centred_on_bias(saved: Tensor, bias: Tensor | None, cut: Plan, wide: torch.dtype) -> Tensor:
    """Put the bias where the kernel looks for the mean: what stands before the activation lies about it."""
    saved = saved.clone()
    centres = saved[2 * cut.channels :].view(wide)[: cut.fold * cut.channels].view(cut.fold, cut.channels)
    centres.copy_(torch.zeros(1) if bias is None else bias.detach())
    return saved
