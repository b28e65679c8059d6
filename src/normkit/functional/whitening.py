"""Whitening batch normalization as a function."""

import torch
from torch import Tensor, nn

from ..axes import channel_shape, values_per_channel
from ..errors import ArgumentError, DtypeError, ShapeError, StatisticsError
from ..kernels.plain import channels as plain
from ..kernels.plain.samples import wide
from . import checks, shapes
from .averages import Average, Variance, check_law, update_statistics
from .exported import check_not_exported
from .matrix_root import matrix_root
from .overrides import is_exporting, overridable

__all__ = ["check_whitening", "whitening_batch_norm"]

# Newton steps after which an inverse root of eigenvalues down to 1e-15 of their sum no longer moves in float64: a small
# one grows by 1.5 in its root with every step, 1.5 ** 43 = 1e7.6, and the last few steps double the digits.
_CONVERGED = 50


@overridable
def whitening_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_covariance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_groups: int = 1,
    shrinkage: float = 0.0,
    iterations: int | None = None,
    unbiased: bool = True,
    num_batches_tracked: Tensor | None = None,
    average: Average = "moving",
    variance: Variance = "batch",
    caller: nn.Module | None = None,
) -> Tensor:
    """Remove mean and correlations of every group of channels, over the batch and all positions.

    ``y = (S + eps I)^(-1/2) (x - mean) * weight + bias`` with the shrunk covariance
    ``S = (1 - shrinkage) * covariance + shrinkage * trace / d * I``

    x and y are ``(N, C, *)``; mean, weight and bias ``(C,)``; the covariance ``(G, d, d)``, d = C / G channels.

    Conventions:
        Axes averaged: all but dimension 1.
        eps is added to the variances, on the diagonal; its unit is that of the input squared.
        The inverse root is the symmetric one (ZCA), by eigenvectors or approached by Newton's iteration.
        Covariance: divided by m to whiten, by m - 1 to be stored (by m with ``unbiased=False``), before shrinkage and
        eps: prediction applies both to what is stored.
        Momentum: ``running = (1 - momentum) * running + momentum * batch``.
        Accumulation: float64.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64. An empty batch passes and updates nothing.
        running_mean: ``(C,)``, updated in training, used otherwise; None for neither.
        running_covariance: ``(G, d, d)``, likewise.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        training: whiten with the batch's statistics and update the running ones.
        momentum: the weight of the new batch, from 0 to 1; None for the plain average of all batches.
        eps: positive.
        num_groups: G, a divisor of C.
        shrinkage: from 0 to 1. With fewer values per channel than channels in a group, use some.
        iterations: Newton steps, at least 1; None for the eigenvectors.
        unbiased: store the unbiased covariance.
        num_batches_tracked: an int64 counter, advanced by one with each update.
        average: as for :func:`batch_norm`.
        variance: likewise, ``"total"`` with the products of the distances between the batch means for the covariance.
        caller: the layer that errors should name.

    Returns:
        y, in the type of the input.

    Raises:
        ShapeError: fewer than two dimensions, an argument of another size, or one value per channel in training.
        DtypeError: integers, complex numbers, a sparse tensor, or a mix of types.
        StatisticsError: running statistics that cannot be written.
        ArgumentError: a setting out of range, or stored statistics missing.

    Example:
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.0], [1.0, 2.0], [2.0, 1.0]])
        >>> whitening_batch_norm(x, None, None, training=True, eps=1e-12)
        tensor([[-1., -1.],
                [ 1.,  1.],
                [-1.,  1.],
                [ 1., -1.]])

    References:
        Huang, Yang, Lang and Deng, Decorrelated Batch Normalization, 2018, arXiv:1804.08450, section 3; Huang, Zhou,
        Zhu, Liu and Shao, Iterative Normalization, 2019, arXiv:1904.03441, equations (4) and (5).
    """
    _check(input, running_mean, running_covariance, weight, bias, training, momentum, eps, num_batches_tracked, caller)
    check_whitening(input.shape[1], num_groups, shrinkage, iterations, caller)
    _check_covariance(running_covariance, input, num_groups, training, caller)
    check_law(average, variance, momentum, training and running_mean is not None, num_batches_tracked, caller)
    if input.numel() == 0:
        return plain.pass_empty(input, weight, bias)
    x = input.to(wide(input)).transpose(0, 1).reshape(num_groups, input.shape[1] // num_groups, -1)
    if training:
        check_not_exported(running_mean, caller)
        # Centred on a value of its own before it is averaged, so that a large mean costs nothing.
        base = plain.origin(x.detach(), (2,))
        offset = (x - base).mean(-1, keepdim=True)
        mean, deviation = base + offset, x - base - offset
        covariance = deviation @ deviation.mT / x.shape[-1]
    else:
        assert running_mean is not None
        assert running_covariance is not None
        mean = running_mean.to(x.dtype).reshape(num_groups, -1, 1)
        deviation, covariance = x - mean, running_covariance.to(x.dtype)
    # Other programs that read a graph have no eigenvectors; what is stored needs no derivative.
    steps = _CONVERGED if iterations is None and not training and is_exporting() else iterations
    xhat = _inverse_root(covariance, eps, shrinkage, steps) @ deviation
    y = xhat.reshape(input.shape[1], input.shape[0], *input.shape[2:]).transpose(0, 1)
    broadcast = channel_shape(input.dim(), input.shape[1])
    if weight is not None:
        y = y * weight.reshape(broadcast)
    if bias is not None:
        y = y + bias.reshape(broadcast)
    if training and running_mean is not None and running_covariance is not None:
        count = values_per_channel(tuple(input.shape))
        stored = covariance.detach() * (count / (count - 1) if unbiased and variance == "batch" else 1.0)
        kept = (running_mean, running_covariance, num_batches_tracked)
        update_statistics(*kept, mean.detach().flatten(), stored, momentum, average, variance)
    return y.to(input.dtype)


def _inverse_root(covariance: Tensor, eps: float, shrinkage: float, iterations: int | None) -> Tensor:
    """Return the inverse root of the shrunk covariance plus eps."""
    d = covariance.shape[-1]
    identity = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    regularized = (1 - shrinkage) * covariance + (shrinkage / d * trace + eps) * identity
    if iterations is None:
        inverse: Tensor = torch.linalg.inv(matrix_root(regularized, eps))
        return inverse
    total = regularized.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    scaled, root = regularized / total, identity.expand_as(regularized)
    if iterations == _CONVERGED:
        return _coupled_root(scaled, identity) * total.rsqrt()
    for _ in range(iterations):
        root = 1.5 * root - 0.5 * root @ root @ root @ scaled
    return root * total.rsqrt()


def _coupled_root(scaled: Tensor, identity: Tensor) -> Tensor:
    """Return the inverse root of matrices of trace one, as exact as its type allows.

    The same iteration, carried on with the root beside its inverse: so it does not drift apart once it has converged.
    """
    root, inverse = scaled, identity.expand_as(scaled)
    for _ in range(_CONVERGED):
        step = 1.5 * identity - 0.5 * inverse @ root
        root, inverse = root @ step, step @ inverse
    return inverse


def check_whitening(
    channels: int, num_groups: int, shrinkage: float, iterations: int | None, caller: nn.Module | None = None
) -> None:
    """Refuse settings that cannot be whitened with.

    Raises:
        ArgumentError: groups that do not divide the channels, shrinkage outside 0 to 1, or iterations below 1.
    """
    shapes.check_divides(num_groups, channels, caller)
    checks.check_number("shrinkage", shrinkage, 0.1, caller)
    if not 0 <= shrinkage <= 1:
        checks.refuse(ArgumentError, f"shrinkage must be from 0 to 1, got {shrinkage}; pass shrinkage=0.1", caller)
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1):
        advice = "5 is the paper's, None takes the eigenvectors"
        checks.refuse(
            ArgumentError, f"iterations must be an integer of at least 1, got {iterations!r}; {advice}", caller
        )


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_covariance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    caller: nn.Module | None,
) -> None:
    checks.check_input(x, caller)
    if x.dim() < 2:
        got = f"{x.dim()}, shape {tuple(x.shape)}; pass (N, C, *)"
        checks.refuse(ShapeError, f"Expected at least 2 dimensions for input tensor but received {got}", caller)
    checks.check_channels(x, x.shape[1], caller)
    for name, value in {"running_mean": running_mean, "weight": weight, "bias": bias}.items():
        checks.check_parameter(name, value, x, caller)
    checks.check_eps(eps, positive=True, caller=caller)
    checks.check_momentum(momentum, caller)
    if (running_mean is None) != (running_covariance is None):
        missing = "running_mean" if running_mean is None else "running_covariance"
        checks.refuse(ArgumentError, f"{missing} is None and the other is not; pass both or neither", caller)
    checks.check_statistics("running_mean", running_mean, write=training, caller=caller)
    checks.check_statistics("running_covariance", running_covariance, write=training, caller=caller)
    checks.check_statistics("num_batches_tracked", num_batches_tracked, write=training, caller=caller)
    if training:
        written = {"running_mean": running_mean, "running_covariance": running_covariance}
        read = {"input": x, "weight": weight, "bias": bias}
        checks.check_apart({**written, "num_batches_tracked": num_batches_tracked}, read, caller)
        checks.check_values_per_channel(x, caller)
        checks.check_not_shared(running_mean, x, caller)
        if running_mean is not None and momentum is None and num_batches_tracked is None:
            checks.refuse(StatisticsError, "momentum=None needs num_batches_tracked; pass an int64 tensor", caller)
    elif running_mean is None:
        advice = "pass training=True for the batch's own"
        checks.refuse(ArgumentError, f"training=False needs the running statistics, got None; {advice}", caller)


def _check_covariance(
    value: Tensor | None, x: Tensor, num_groups: int, training: bool, caller: nn.Module | None
) -> None:
    if value is None:
        return
    d = x.shape[1] // num_groups
    if not isinstance(value, Tensor):
        checks.refuse(DtypeError, f"running_covariance must be a tensor, got {type(value).__name__}", caller)
    if tuple(value.shape) != (num_groups, d, d):
        got, wanted = tuple(value.shape), (num_groups, d, d)
        checks.refuse(ShapeError, f"running_covariance has shape {got}; for {num_groups} groups pass {wanted}", caller)
    checks.check_match("running_covariance", value, x, caller)
