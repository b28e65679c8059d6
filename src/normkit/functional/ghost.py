"""Ghost batch normalization as a function."""

import torch
from torch import Tensor, nn

from ..axes import batch_axes, channel_shape, values_per_channel
from ..errors import ArgumentError, ShapeError
from ..kernels.plain import channels as plain_channels
from ..kernels.plain.samples import wide
from . import checks
from .averages import Average, Variance, check_law, update_statistics
from .batch import batch_norm, check_arguments
from .exported import check_not_exported
from .overrides import overridable
from .rows import normalize

__all__ = ["check_ghost_size", "check_parts", "ghost_batch_norm"]


@overridable
def ghost_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    ghost_size: int,
    unbiased: bool = True,
    num_batches_tracked: Tensor | None = None,
    average: Average = "moving",
    variance: Variance = "batch",
    caller: nn.Module | None = None,
) -> Tensor:
    """Normalize the batch in parts of at most ``ghost_size`` samples, each by its own statistics.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, mean and var of the part in training, else the running ones.

    x and y are ``(N, C, *)``; weight, bias and the running statistics are ``(C,)``.

    Conventions:
        Parts: consecutive samples, as few parts as ``ghost_size`` allows and as equal as possible, larger ones first;
        a remainder is spread, so that from ``ghost_size=3`` on none is left with a single sample. Of an odd batch in
        parts of 2 one is, which is refused where a sample has one position. A batch that is smaller is one part.
        Axes averaged: the samples of a part and all positions.
        eps is added to the variance; its unit is that of the input squared.
        Stored, once per call: mean and variance of the whole batch, divisor m - 1 (m with ``unbiased=False``).
        Momentum: ``running = (1 - momentum) * running + momentum * batch``.
        Accumulation: float64.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64. An empty batch passes and updates nothing.
        running_mean: ``(C,)``, updated in training, used otherwise; None for neither.
        running_var: ``(C,)``, likewise.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        training: normalize by parts and update; otherwise by the running statistics.
        momentum: the weight of the new batch, from 0 to 1; None for the plain average of all batches.
        eps: positive in training, not negative otherwise.
        ghost_size: the largest part, at least 1.
        unbiased: store the unbiased variance.
        num_batches_tracked: an int64 counter, advanced by one with each update.
        average: as for :func:`batch_norm`.
        variance: likewise.
        caller: the layer that errors should name.

    Returns:
        y, in the type of the input.

    Raises:
        ShapeError: as for ``batch_norm``; a part would have one value per channel.
        DtypeError: as for ``batch_norm``.
        StatisticsError: as for ``batch_norm``.
        ArgumentError: as for ``batch_norm``; ghost_size below 1.

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
        >>> ghost_batch_norm(x, None, None, training=True, eps=1e-12, ghost_size=2).flatten()
        tensor([-1.,  1., -1.,  1.])

    References:
        Hoffer, Hubara and Soudry, Train longer, generalize better, 2017, arXiv:1705.08741, Algorithm 1. There a running
        update follows every part; here one follows the step.
    """
    check_arguments(
        input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, caller
    )
    check_ghost_size(ghost_size, caller)
    check_law(average, variance, momentum, training and running_mean is not None, num_batches_tracked, caller)
    if not training or input.numel() == 0:
        return batch_norm(input, running_mean, running_var, weight, bias, training, 0.0, eps, caller=caller)
    check_not_exported(running_mean, caller)
    check_parts(input, ghost_size, caller)
    _, _, size, larger = _cut(input, ghost_size)
    if torch.compiler.is_compiling() or checks.is_tracing():
        y = _normalize_any_number(input, ghost_size, weight, bias, eps)
    else:
        cut = larger * (size + 1)
        blocks = [(input[:cut], size + 1), (input[cut:], size)] if larger else [(input, size)]
        # In the wide type, so that the gradients of all parts are added before they are rounded.
        gamma, beta = (None if value is None else value.to(wide(input)) for value in (weight, bias))
        each = [_normalize_parts(block, members, gamma, beta, eps) for block, members in blocks]
        y = each[0] if len(each) == 1 else torch.cat(each)
    if running_mean is not None and running_var is not None:
        mean, var = plain_channels.statistics(input.detach())
        count = values_per_channel(tuple(input.shape))
        stored = var * (count / (count - 1)) if unbiased and variance == "batch" else var
        law = (momentum, average, variance)
        update_statistics(running_mean, running_var, num_batches_tracked, mean, stored, *law)
    return y


def check_parts(x: Tensor, ghost_size: int, caller: nn.Module | None) -> None:
    """Refuse a batch of which a part would have one value per channel.

    Raises:
        ShapeError: it would.
    """
    samples, parts, size, _ = _cut(x, ghost_size)
    # In a graph for any number of samples this is asked of the numbers, in _normalize_any_number.
    if not torch.compiler.is_exporting() and size * values_per_channel((1, *x.shape[1:])) == 1:
        checks.refuse(
            ShapeError,
            f"Expected more than 1 value per channel when training, got {samples} samples in {parts} parts of "
            f"ghost_size={ghost_size}, so a part has one value per channel. Pass a larger ghost_size or drop_last=True",
            caller,
        )


def _cut(x: Tensor, ghost_size: int) -> tuple[int, int, int, int]:
    """Return the number of samples, of parts, of samples in a smaller part, and of parts that have one more."""
    samples = x.shape[0]
    parts = (samples + ghost_size - 1) // ghost_size
    size = samples // parts
    return samples, parts, size, samples - parts * size


def _normalize_any_number(x: Tensor, ghost_size: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize by parts in a graph that serves any number of samples: nothing in it hangs on how they divide."""
    samples, _, size, larger = _cut(x, ghost_size)
    cut, order = larger * (size + 1), torch.arange(samples, device=x.device)
    part = torch.where(order < cut, order // (size + 1), larger + (order - cut) // size)
    positions, broadcast = batch_axes(x.dim())[1:], channel_shape(x.dim(), x.shape[1])
    each = (slice(None), slice(None), *(None for _ in positions))
    count = (size + (order < cut).to(wide(x)))[:, None] * values_per_channel((1, *x.shape[1:]))

    def average(values: Tensor) -> Tensor:
        """Return the mean of the part that each sample is in, to be broadcast over its positions."""
        sums = values.sum(positions) if positions else values
        return (torch.zeros_like(sums).index_add(0, part, sums)[part] / count)[each]

    centred = x.to(wide(x)) - plain_channels.origin(x.detach(), batch_axes(x.dim())).to(wide(x))
    centred = centred - average(centred)
    y = centred * (average(centred.square()) + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(wide(x)).reshape(broadcast)
    if bias is not None:
        y = y + bias.to(wide(x)).reshape(broadcast)
    # A part with one value per channel is refused where its size is known; here it is no number.
    return torch.where((count > 1)[each], y, torch.nan).to(x.dtype)


def _normalize_parts(block: Tensor, size: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize samples that divide into parts of one size."""
    seen = block.unflatten(0, (-1, size))
    broadcast = (1, 1, block.shape[1], *(1 for _ in range(2, block.dim())))
    gamma, beta = (None if value is None else value.reshape(broadcast) for value in (weight, bias))
    return normalize(seen, gamma, beta, (1, *range(3, seen.dim())), eps).flatten(0, 1)


def check_ghost_size(ghost_size: int, caller: nn.Module | None = None) -> None:
    """Refuse a size that is below 1 or no integer.

    Raises:
        ArgumentError: ghost_size is out of range.
    """
    if isinstance(ghost_size, bool) or not isinstance(ghost_size, int) or ghost_size < 1:
        checks.refuse(
            ArgumentError, f"ghost_size must be an integer of at least 1, got {ghost_size!r}; pass 32", caller
        )
