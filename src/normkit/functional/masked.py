"""Masked batch normalization as a function."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..axes import batch_axes, channel_shape
from ..errors import DtypeError, ShapeError
from ..kernels.plain import channels as plain
from ..kernels.plain.samples import wide
from . import checks
from .averages import Average, Variance, check_law, update_statistics
from .batch import batch_norm, check_arguments
from .exported import check_not_exported
from .overrides import overridable
from .transforms import is_recorded_as_graph

__all__ = ["check_mask", "masked_batch_norm", "over_valid"]


@overridable
def masked_batch_norm(
    input: Tensor,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    unbiased: bool = True,
    num_batches_tracked: Tensor | None = None,
    average: Average = "moving",
    variance: Variance = "batch",
    caller: nn.Module | None = None,
) -> Tensor:
    """Normalize each channel over the valid positions; the others become zero.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` where the mask is True, 0 elsewhere.

    x and y are ``(N, C, *)``, the mask is ``(N, *)``; all others are ``(C,)``. What stands at invalid positions, NaN
    included, has no influence and gets a gradient of zero; more padding changes nothing.

    Conventions:
        Axes averaged: all but dimension 1, over the valid positions only; m counts these.
        eps is added to the variance; its unit is that of the input squared.
        Variance: divided by m to normalize, by m - 1 to be stored (by m with ``unbiased=False``).
        Momentum: ``running = (1 - momentum) * running + momentum * batch``.
        Accumulation: float64.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64.
        mask: boolean, ``(N, *)``: the input's shape without the channels. True marks a valid position. A batch without
            one passes and updates nothing; None marks all, and is batch normalization.
        running_mean: ``(C,)``, updated in training, used otherwise; None for neither.
        running_var: ``(C,)``, likewise.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        training: normalize with the batch's statistics and update the running ones.
        momentum: the weight of the new batch, from 0 to 1; None for the plain average of all batches.
        eps: positive in training, not negative otherwise.
        unbiased: store the unbiased variance.
        num_batches_tracked: an int64 counter, advanced by one with each update.
        average: as for :func:`batch_norm`.
        variance: likewise.
        caller: the layer that errors should name.

    Returns:
        y, in the type of the input.

    Raises:
        ShapeError: as for ``batch_norm``; the mask has another shape; one valid position in training.
        DtypeError: as for ``batch_norm``; the mask is not boolean.
        StatisticsError: as for ``batch_norm``.
        ArgumentError: as for ``batch_norm``.

    Example:
        >>> x, mask = torch.tensor([[[1.0, 3.0, 999.0]]]), torch.tensor([[True, True, False]])
        >>> masked_batch_norm(x, mask, None, None, training=True, eps=1e-12)
        tensor([[[-1.,  1.,  0.]]])
    """
    if mask is None:
        statistics = (running_mean, running_var, weight, bias)
        return batch_norm(
            input,
            *statistics,
            training,
            momentum,
            eps,
            unbiased=unbiased,
            num_batches_tracked=num_batches_tracked,
            average=average,
            variance=variance,
            caller=caller,
        )
    check_arguments(
        input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, caller
    )
    check_mask(mask, input, caller)
    check_law(average, variance, momentum, training and running_mean is not None, num_batches_tracked, caller)
    valid = mask.unsqueeze(1)
    count = mask.sum().to(wide(input))
    if not training:
        quiet = input.masked_fill(~valid, 0)
        y = batch_norm(quiet, running_mean, running_var, weight, bias, False, 0.0, eps, caller=caller)
        return y.masked_fill(~valid, 0)
    check_not_exported(running_mean, caller)
    if not (input.is_meta or torch.compiler.is_compiling() or is_recorded_as_graph()):
        number = int(count)
        if number == 0:
            return plain.pass_empty(input.masked_fill(~valid, 0), weight, bias).masked_fill(~valid, 0)
        if number == 1:
            checks.refuse(
                ShapeError,
                "Expected more than 1 value per channel when training, got a mask with 1 valid position; one value has "
                "no variance. Leave this batch out",
                caller,
            )
    y, mean, var = _normalize_valid(input, valid, count, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        stored = var * (count / (count - 1)) if unbiased and variance == "batch" else var
        law = (momentum, average, variance)
        update_statistics(running_mean, running_var, num_batches_tracked, mean, stored, *law)
    return y


def _normalize_valid(
    x: Tensor, valid: Tensor, count: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean and biased variance over the valid positions, differentiable to every order."""
    axes, broadcast = batch_axes(x.dim()), channel_shape(x.dim(), x.shape[1])
    # Centred on the middle one of three valid values, so that a large mean costs nothing, nor one value far out, and a
    # constant channel stays constant.
    order = valid.flatten().cumsum(0)
    total = order[-1:]
    wanted = torch.cat([torch.ones_like(total), (total + 1) // 2, total])
    places = (order >= wanted[:, None]).int().argmax(1)
    # Not by an index, which would have to be known: a meta tensor's is not, nor that of a graph being compiled.
    three = x.detach().movedim(1, -1).flatten(0, -2).index_select(0, places)
    base = plain.middle_of(three[0], three[1], three[2]).to(wide(x))
    distance = (x.to(wide(x)) - base.reshape(broadcast)).masked_fill(~valid, 0)
    offset = distance.sum(axes) / count
    centred = (distance - offset.reshape(broadcast)).masked_fill(~valid, 0)
    var = centred.square().sum(axes) / count
    y = centred * (var + eps).rsqrt().reshape(broadcast)
    if weight is not None:
        y = y * weight.reshape(broadcast)
    if bias is not None:
        y = y + bias.reshape(broadcast)
    return y.masked_fill(~valid, 0).to(x.dtype), (base + offset).detach(), var.detach()


def over_valid(
    x: Tensor, mask: Tensor, residual: Tensor | None, normalize: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """Return ``normalize(rows, rows of the residual)`` at the valid positions and 0 elsewhere, in the format of x.

    The rows are ``(V, C)``: the V positions where the mask, ``(N, *)``, is True, in their order. So padding takes no
    part in whatever is done to them, nor in its derivatives.

    >>> x, mask = torch.tensor([[[1.0, 3.0, 9.0]]]), torch.tensor([[True, True, False]])
    >>> over_valid(x, mask, None, lambda rows, _: rows - rows.mean(0))
    tensor([[[-1.,  1.,  0.]]])
    """
    rows, beside = (None if value is None else value.movedim(1, -1)[mask] for value in (x, residual))
    assert rows is not None
    y = normalize(rows, beside)
    return torch.zeros_like(x.detach()).movedim(1, -1).index_put((mask,), y).movedim(-1, 1)


def check_mask(mask: Tensor, x: Tensor, caller: nn.Module | None) -> None:
    """Refuse what does not mark positions of x.

    Raises:
        DtypeError: it is not boolean, or on another device.
        ShapeError: its shape is not that of x without channels.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        checks.refuse(DtypeError, f"the mask must be a boolean tensor, got {kind}; pass mask.bool()", caller)
    expected = (x.shape[0], *x.shape[2:])
    if tuple(mask.shape) != expected:
        got = tuple(mask.shape)
        checks.refuse(
            ShapeError,
            f"the mask has shape {got}; for input {tuple(x.shape)} pass {expected}, without channels",
            caller,
        )
    if mask.device != x.device:
        checks.refuse(DtypeError, f"the input is on {x.device} and the mask on {mask.device}; move it", caller)
