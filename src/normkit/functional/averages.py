"""By which law running statistics follow the batches: the weight of each batch, and which variance is averaged."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..kernels.plain import channels as plain
from ..kernels.repeated import in_backward, is_repeated
from ..spelling import alternatives
from . import checks
from .transforms import outside_transforms

__all__ = [
    "Average",
    "Variance",
    "check_average",
    "check_law",
    "is_plain_law",
    "momentum_of_half_life",
    "settled",
    "update_statistics",
]

Average = Literal["moving", "debiased"]
Variance = Literal["batch", "total"]


def is_plain_law(average: str, variance: str) -> bool:
    """Tell whether it is torch's, which the kernels compute themselves."""
    return average == "moving" and variance == "batch"


def momentum_of_half_life(half_life: float) -> float:
    """Return the momentum with which a batch weighs half as much after so many others, ``1 - 2^(-1 / half_life)``.

    Raises:
        ArgumentError: half_life is not above 0, or no number.

    >>> round(momentum_of_half_life(1.0), 12), round(momentum_of_half_life(6.578813), 6)
    (0.5, 0.1)
    """
    checks.check_number("half_life", half_life, 10.0)
    if not 0 < half_life < math.inf:
        raise ArgumentError(f"half_life must be above 0 batches and finite, got {half_life}; pass half_life=10")
    return -math.expm1(-math.log(2) / half_life)


def check_average(average: object, variance: object, momentum: float | None, caller: nn.Module | None = None) -> None:
    """Refuse a law that is none, or that contradicts itself.

    Raises:
        ArgumentError: an unknown word; a debiased plain average; a total variance that would count the start values.
    """
    for name, value, known in (("average", average, get_args(Average)), ("variance", variance, get_args(Variance))):
        if value not in known:
            checks.refuse(ArgumentError, f"{name} is {value!r}; {alternatives(value, known)}", caller)
    if average == "debiased" and momentum is None:
        said = "average='debiased' with momentum=None: the plain average of all batches has no start to remove"
        checks.refuse(ArgumentError, f"{said}; pass a momentum or half_life=, or leave average out", caller)
    if variance == "total" and average == "moving" and momentum is not None:
        said = "variance='total' adds the spread of the batch means, among which a moving average counts its start of 0"
        checks.refuse(ArgumentError, f"{said}; pass average='debiased' too, or momentum=None", caller)


def check_law(
    average: str,
    variance: str,
    momentum: float | None,
    moves: bool,
    num_batches_tracked: Tensor | None,
    caller: nn.Module | None,
) -> None:
    """Refuse a law that is none, or that asks for the number of batches where statistics move and none is counted.

    Raises:
        ArgumentError: as for `check_average`; no counter.
    """
    if is_plain_law(average, variance):
        return
    check_average(average, variance, momentum, caller)
    if moves and num_batches_tracked is None:
        said = f"average={average!r} and variance={variance!r} need the number of batches"
        checks.refuse(ArgumentError, f"{said}; pass num_batches_tracked, an int64 tensor", caller)


# How much more than by its momentum a debiased average weighs a batch, when it counts as settled.
_SETTLED = 1e-3


def settled(momentum: float | None, average: str) -> int:
    """Return after how many batches an average weighs the next by its momentum, or a thousandth more.

    What was measured over a whole population counts as so many: fewer, and the next batch would replace much of it. 0
    where the number of batches is not asked for, and for the plain average, where each batch counts as one.

    >>> settled(momentum_of_half_life(100), "debiased"), settled(0.1, "moving"), settled(None, "moving")
    (997, 0, 0)
    """
    if average != "debiased" or momentum is None or not 0 < momentum < 1:
        return 0
    return math.ceil(math.log(_SETTLED) / math.log1p(-momentum))


def _weight_of(
    momentum: float | None, average: str, num_batches_tracked: Tensor | None, like: Tensor
) -> Tensor | float:
    """Return what the next batch weighs beside what is stored.

    ``momentum``, ``1 / t`` for the plain average, or ``momentum / (1 - (1 - momentum)^t)`` for a debiased one, t its
    number from 1: the moving average of Adam, whose weights add up to 1 at every t. At t = 1 it is 1.
    """
    if momentum is not None and average == "moving":
        return momentum
    assert num_batches_tracked is not None
    step = (num_batches_tracked + 1).to(like.dtype)
    if momentum is None:
        return 1.0 / step
    if not 0 < momentum < 1:
        # 0 holds the statistics still; 1 is the last batch alone.
        return momentum
    return momentum / -torch.expm1(step * math.log1p(-momentum))


def _spread(running_mean: Tensor, mean: Tensor, var: Tensor, weight: Tensor | float) -> Tensor:
    """Return what a mean's distance adds to its batch's variance, so that the average is the total variance.

    ``V <- (1 - w) * (V + w * d^2) + w * v`` keeps ``V = average of v + variance of the batch means`` under the weights
    of the average (West 1979); it is the usual update by ``v + (1 - w) * d^2``. Of a covariance, ``(G, d, d)``, it is
    the products of the distances of each pair of channels of a group.
    """
    distance = mean - running_mean.to(mean.dtype)
    if var.dim() == 1:
        return distance.square() * (1 - weight)
    apart = distance.reshape(var.shape[:2])
    return apart[:, :, None] * apart[:, None, :] * (1 - weight)


@outside_transforms
@torch.no_grad()
def update_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    average: Average = "moving",
    variance: Variance = "batch",
) -> None:
    """Move the running statistics towards those of a batch and count it, by the law of `averages`.

    With ``variance="total"`` var is the batch's with divisor m. It may be a covariance, ``(G, d, d)``.

    A forward that a backward runs again moves nothing: see `kernels.repeated`.
    """
    factor = _weight_of(momentum, average, num_batches_tracked, mean)
    if variance == "total":
        var = var + _spread(running_mean, mean, var, factor)
    batch = ((running_mean, mean), (running_var, var))
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        from ..kernels import operators

        still = operators.repeated(running_mean, "")
        for running, new in batch:
            running.copy_(torch.where(still, running, plain.moved(running, new, factor)))
        if num_batches_tracked is not None:
            num_batches_tracked.add_(~still)
        return
    if in_backward() and is_repeated():
        return
    for running, new in batch:
        running.copy_(plain.moved(running, new, factor))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
