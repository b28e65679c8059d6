"""Batch renormalization as a function."""

import torch
from torch import Tensor, nn

from ..axes import batch_axes, channel_shape, values_per_channel
from ..errors import ArgumentError
from ..kernels.plain import channels as plain_channels
from ..kernels.plain.samples import wide
from ..kernels.repeated import is_repeated, may_be_repeated
from . import checks
from .averages import Average, Variance, check_law, update_statistics
from .batch import batch_norm, check_arguments
from .exported import check_not_exported
from .first_runs import find_first_run, keep_first_run
from .overrides import overridable
from .rows import normalize

__all__ = ["batch_renorm", "check_limits"]

_COMPILED = (
    "batch_renorm: a backward runs this compiled forward again (activation checkpointing), and r and d of its first "
    "run are lost, for the running statistics have moved. Leave the layer out of the checkpoint or of torch.compile"
)


@overridable
def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    unbiased: bool = True,
    num_batches_tracked: Tensor | None = None,
    average: Average = "moving",
    variance: Variance = "batch",
    caller: nn.Module | None = None,
) -> Tensor:
    """Normalize by the batch, then correct towards what prediction will see.

    ``y = ((x - mean) / sigma_batch * r + d) * weight + bias``, with
    ``r = clip(sigma_batch / sigma, 1 / r_max, r_max)`` and ``d = clip((mean - running_mean) / sigma, -d_max, d_max)``

    x and y are ``(N, C, *)``; all others are ``(C,)``. Without limits the output is that of prediction; with
    ``r_max=1, d_max=0`` it is batch normalization.

    Conventions:
        Axes averaged: all but dimension 1.
        ``sigma = sqrt(var + eps)``, of the batch (divisor m) and of the running variance alike.
        r and d take the running statistics from before this batch, and are constants to the gradient. Where a backward
        runs the forward again (activation checkpointing), they are those of its first run.
        Variance: divided by m to normalize, by m - 1 to be stored (by m with ``unbiased=False``).
        Momentum: ``running = (1 - momentum) * running + momentum * batch``.
        Accumulation: float64.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64. An empty batch passes and updates nothing.
        running_mean: ``(C,)``, updated in training.
        running_var: ``(C,)``, likewise.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        training: renormalize and update; otherwise normalize by the running statistics.
        momentum: the weight of the new batch, from 0 to 1; None for the plain average of all batches.
        eps: positive in training, not negative otherwise.
        r_max: at least 1.
        d_max: at least 0.
        unbiased: store the unbiased variance.
        num_batches_tracked: an int64 counter, advanced by one with each update.
        average: as for :func:`batch_norm`.
        variance: likewise.
        caller: the layer that errors should name.

    Returns:
        y, in the type of the input.

    Raises:
        ShapeError: as for ``batch_norm``.
        DtypeError: as for ``batch_norm``.
        StatisticsError: as for ``batch_norm``; run again by a backward, and the first run is not found any more.
        ArgumentError: as for ``batch_norm``; r_max below 1 or d_max below 0.

    Example:
        >>> import torch
        >>> x, mean, var = torch.tensor([[1.0], [3.0]]), torch.zeros(1), torch.full((1,), 4.0)
        >>> batch_renorm(x, mean, var, training=True, eps=1e-12).flatten()
        tensor([0.5000, 1.5000])

    References:
        Ioffe, Batch Renormalization, 2017, arXiv:1702.03275, Algorithm 1. There the running quantity is sigma; here it
        is the variance, so that state is exchanged with batch normalization.
    """
    check_arguments(
        input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, caller
    )
    if running_mean is None:
        checks.refuse(
            ArgumentError, "running_mean is None; renormalization needs running statistics, pass both", caller
        )
    check_limits(r_max, d_max, caller)
    check_law(average, variance, momentum, training, num_batches_tracked, caller)
    if not training or input.numel() == 0:
        return batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps, caller=caller)
    check_not_exported(running_mean, caller)
    mean, var = plain_channels.statistics(input.detach())
    if not torch.compiler.is_compiling() and is_repeated():
        r, d = find_first_run(running_mean, mean, var, eps, caller)
    else:
        sigma = (running_var.to(wide(input)) + eps).sqrt()
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            sigma = _once(sigma)
        r = ((var + eps).sqrt() / sigma).clamp(1 / r_max, r_max)
        d = ((mean - running_mean) / sigma).clamp(-d_max, d_max)
        if not torch.compiler.is_compiling() and may_be_repeated():
            keep_first_run(running_mean, mean, var, (r, d))
    gamma, beta = r, d
    if weight is not None:
        gamma, beta = r * weight, d * weight
    if bias is not None:
        beta = beta + bias
    broadcast = channel_shape(input.dim(), input.shape[1])
    y = normalize(input, gamma.reshape(broadcast), beta.reshape(broadcast), batch_axes(input.dim()), eps)
    count = values_per_channel(tuple(input.shape))
    stored = var * (count / (count - 1)) if unbiased and variance == "batch" else var
    law = (momentum, average, variance)
    update_statistics(running_mean, running_var, num_batches_tracked, mean, stored, *law)
    return y


def _once(sigma: Tensor) -> Tensor:
    """Return sigma; where a backward runs the compiled graph again this is refused."""
    from ..kernels import operators

    return sigma.masked_fill(operators.repeated(sigma, _COMPILED), 0.0)


def check_limits(r_max: float, d_max: float, caller: nn.Module | None = None) -> None:
    """Refuse limits that would turn r or d inside out.

    Raises:
        ArgumentError: r_max below 1, d_max below 0, NaN, or no number.
    """
    checks.check_number("r_max", r_max, 3.0, caller)
    checks.check_number("d_max", d_max, 5.0, caller)
    if not r_max >= 1:
        checks.refuse(ArgumentError, f"r_max must be at least 1, got {r_max}; 1 is batch normalization", caller)
    if not d_max >= 0:
        checks.refuse(ArgumentError, f"d_max must be at least 0, got {d_max}; 0 is batch normalization", caller)
