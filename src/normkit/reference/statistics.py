"""What is kept for prediction: moving averages in both conventions, and the statistics of a whole population.

A layer meets its data in batches. In training it uses each batch's own statistics; for prediction it keeps a summary of
them all. The sources disagree on which, so every choice has a word here and none is silent.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from numpy.typing import ArrayLike

from ..axes import batch_axes, values_per_channel
from ..errors import ArgumentError, ShapeError
from .arrays import Array, Intermediates, as_float64, check_layout, per_channel, spread

__all__ = [
    "Running",
    "Statistics",
    "averaged_statistics",
    "batch_statistics",
    "cumulative_update",
    "debiased_update",
    "merge_statistics",
    "population_statistics",
    "running_update",
]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Statistics(Intermediates):
    """Mean and variance per channel of a number of values.

    Attributes:
        count: how many values every channel has.
        mean: ``(C,)``.
        var: ``(C,)``, the biased variance: divisor ``count``.
    """

    count: int
    mean: Array
    var: Array

    @property
    def unbiased_var(self) -> Array:
        """The unbiased variance, divisor ``count - 1``.

        Raises:
            ShapeError: there is only one value per channel.
        """
        if self.count < 2:
            raise ShapeError(
                f"the unbiased variance divides by count - 1, and each channel has {self.count} value; "
                "pass more samples, or use the biased variance (unbiased=False)"
            )
        return self.var * (self.count / (self.count - 1))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Running(Intermediates):
    """What a layer keeps for prediction.

    Attributes:
        mean: ``(C,)``.
        var: ``(C,)``.
    """

    mean: Array
    var: Array


def batch_statistics(x: ArrayLike) -> Statistics:
    """Return mean, biased variance and count of every channel of ``(N, C, *)``.

    >>> found = batch_statistics([[1.0], [3.0]])
    >>> found.count, found.mean.item(), found.var.item(), found.unbiased_var.item()
    (2, 2.0, 1.0, 2.0)
    """
    x = as_float64(x, "x")
    check_layout(x)
    axes = batch_axes(x.ndim)
    mean = x.mean(axis=axes)
    var = (deviations(x, mean) ** 2).mean(axis=axes)
    return Statistics(count=values_per_channel(x.shape), mean=mean, var=var)


def deviations(x: Array, mean: Array) -> Array:
    """Return ``x - mean``, where the mean is x's own.

    The deviations sum to zero. What their sum still has is the rounding of the mean, so that is taken away too: at
    mean/std 1e4 it is a thousand times the rounding of the deviations themselves.
    """
    rough = x - spread(mean, x.ndim)
    remainder: Array = rough.mean(axis=batch_axes(x.ndim), keepdims=True)
    return rough - remainder


def running_update(
    running: Running,
    batch: Statistics,
    *,
    momentum: float | None = None,
    decay: float | None = None,
    unbiased: bool = True,
) -> Running:
    """Move the stored statistics towards those of one batch.

    ``new = (1 - momentum) * old + momentum * batch``, or ``new = decay * old + (1 - decay) * batch``.

    Conventions: ``momentum`` is the weight of the new value (PyTorch, S2), ``decay`` that of the old one (S0, Keras,
    Flax, ONNX). Exactly one of them is given, so that 0.9 never means the other thing. ``unbiased=True`` stores the
    variance with divisor m - 1 (PyTorch, S1, S2), ``False`` the one the batch was normalized with (S0).

    Args:
        running: what is stored.
        batch: the statistics of the new batch.
        momentum: from 0 to 1.
        decay: from 0 to 1.
        unbiased: which variance is stored.

    Returns:
        The new statistics; the old ones are unchanged.

    Raises:
        ArgumentError: both or neither of momentum and decay are given, or outside 0 to 1.
        ShapeError: the channels differ, or one value per channel has no unbiased variance.

    Example:
        >>> start = Running(mean=as_float64([0.0], "mean"), var=as_float64([1.0], "var"))
        >>> batch = batch_statistics([[1.0], [3.0]])
        >>> after = running_update(start, batch, momentum=0.1)
        >>> after.mean.item(), after.var.item()
        (0.2, 1.1)
    """
    return _move(running, batch, _new_weight(momentum, decay), unbiased=unbiased)


def cumulative_update(running: Running, batch: Statistics, *, step: int, unbiased: bool = True) -> Running:
    """Average all batches so far with equal weight: what torch.nn does with ``momentum=None``.

    ``new = old + (batch - old) / step``. Batches count alike whatever their size; ``population_statistics`` weighs
    them by their size and counts the spread between them.

    Args:
        running: what is stored after ``step - 1`` batches; ignored when step is 1.
        batch: the statistics of the new batch.
        step: the number of this batch, counted from 1.
        unbiased: which variance is stored.

    Raises:
        ArgumentError: step is below 1.
        ShapeError: the channels differ, or one value per channel has no unbiased variance.
    """
    if step < 1:
        raise ArgumentError(f"step is {step}; batches are counted from 1")
    return _move(running, batch, 1 / step, unbiased=unbiased)


def debiased_update(
    running: Running,
    batch: Statistics,
    *,
    step: int,
    momentum: float | None = None,
    decay: float | None = None,
    total: bool = False,
    unbiased: bool = True,
) -> Running:
    """Move the stored statistics so that nothing is left of what they were before the first batch.

    ``w = momentum / (1 - (1 - momentum)^step)``, ``mean = (1 - w) * old + w * batch``, and the variance likewise; with
    ``total`` ``var = (1 - w) * (old + w * (batch mean - old mean)^2) + w * batch variance``, whose divisor is m: the
    variance of all values under the weights of the average, that between the batches included.

    Args:
        running: what is stored after ``step - 1`` batches; without influence when step is 1.
        batch: the statistics of the new batch.
        step: the number of this batch, counted from 1.
        momentum: above 0, to 1.
        decay: from 0, below 1.
        total: the variance is the total one.
        unbiased: which variance is stored, where it is not the total one.

    Raises:
        ArgumentError: step is below 1, or as for `running_update`.
        ShapeError: as for `running_update`.

    Example:
        >>> start = Running(mean=as_float64([9.0], "mean"), var=as_float64([9.0], "var"))
        >>> after = debiased_update(start, batch_statistics([[1.0], [3.0]]), step=1, momentum=0.1, total=True)
        >>> after.mean.round(12).item(), after.var.round(12).item()
        (2.0, 1.0)

    References:
        Kingma and Ba, Adam, 2015, arXiv:1412.6980, section 3, for the bias of the start. West, Updating mean and
        variance estimates, 1979, for the variance under weights.
    """
    if step < 1:
        raise ArgumentError(f"step is {step}; batches are counted from 1")
    momentum = _new_weight(momentum, decay)
    weight = momentum / (1 - (1 - momentum) ** step) if momentum else 0.0
    moved = _move(running, batch, weight, unbiased=unbiased and not total)
    if not total:
        return moved
    return Running(mean=moved.mean, var=moved.var + weight * (1 - weight) * (batch.mean - running.mean) ** 2)


def merge_statistics(first: Statistics, second: Statistics) -> Statistics:
    """Return the statistics of both sets of values together, exactly.

    The squared deviations from the common mean are those within each set plus those of the two means:
    ``M2 = M2_a + M2_b + (mean_b - mean_a)^2 * n_a n_b / n``.

    Raises:
        ShapeError: the channels differ.

    References:
        Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979, (2.1).
    """
    if first.mean.shape != second.mean.shape:
        raise ShapeError(f"one part has {len(first.mean)} channels and another {len(second.mean)}; they must agree")
    count = first.count + second.count
    difference = second.mean - first.mean
    mean = first.mean + difference * (second.count / count)
    within = first.var * first.count + second.var * second.count
    between = difference**2 * (first.count * second.count / count)
    return Statistics(count=count, mean=mean, var=(within + between) / count)


def population_statistics(batches: Iterable[ArrayLike]) -> Statistics:
    """Return mean and variance of all samples of all batches, whatever the batch sizes.

    Conventions: every value counts alike, so the result does not depend on how the samples were cut into batches, up
    to rounding. The paper instead averages the batches' own variances, which leaves out how much their means differ:
    see ``averaged_statistics``.

    Args:
        batches: arrays ``(N, C, *)``; an empty batch adds nothing.

    Returns:
        count, mean, var (biased) and ``unbiased_var`` of the population.

    Raises:
        ArgumentError: there is no batch, or all are empty.
        ShapeError: a batch has another rank or another number of channels.

    Example:
        >>> found = population_statistics([[[1.0], [2.0]], [[6.0]]])
        >>> found.count, found.mean.item(), round(found.var.item(), 4), found.unbiased_var.item()
        (3, 3.0, 4.6667, 7.0)
    """
    return reduce(merge_statistics, _each(batches))


def averaged_statistics(batches: Iterable[ArrayLike], *, unbiased: bool = True) -> Running:
    """Return the plain average of the batches' means and variances: the paper's Algorithm 2.

    Conventions: batches count alike whatever their size, as in the paper, where all have the same.

    Args:
        batches: arrays ``(N, C, *)``; an empty batch is left out.
        unbiased: average the unbiased variances (the paper), or those the batches were normalized with.

    Raises:
        ArgumentError: there is no batch, or all are empty.
        ShapeError: a batch has another rank or number of channels, or one value per channel.

    Example:
        >>> found = averaged_statistics([[[1.0], [3.0]], [[5.0], [5.0]]])
        >>> found.mean.item(), found.var.item()
        (3.5, 1.0)

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, Algorithm 2, lines 10 and 11.
    """
    parts = _each(batches)
    start = Running(mean=parts[0].mean, var=parts[0].var)
    numbered = enumerate(parts, start=1)
    return reduce(lambda kept, item: cumulative_update(kept, item[1], step=item[0], unbiased=unbiased), numbered, start)


def _each(batches: Iterable[ArrayLike]) -> list[Statistics]:
    parts = []
    for number, batch in enumerate(batches):
        array = as_float64(batch, f"batch {number}")
        if array.size > 0:
            parts.append(batch_statistics(array))
    if not parts:
        raise ArgumentError("the batches hold no sample; pass at least one that does")
    return parts


def _new_weight(momentum: float | None, decay: float | None) -> float:
    if (momentum is None) == (decay is None):
        given = "neither was given" if momentum is None else f"both momentum={momentum} and decay={decay} were given"
        raise ArgumentError(
            f"{given}; pass exactly one of momentum= (the weight of the new value, 0.1 in torch) "
            "and decay= (the weight of the old one, 0.9 in Keras and ONNX)"
        )
    name, value = ("momentum", momentum) if momentum is not None else ("decay", decay)
    if value is None or not 0 <= value <= 1:
        raise ArgumentError(f"{name} is {value}; allowed is 0 to 1")
    return value if name == "momentum" else 1 - value


def _move(running: Running, batch: Statistics, new_weight: float, *, unbiased: bool) -> Running:
    channels = len(batch.mean)
    mean = per_channel(running.mean, channels, "running mean", default=0.0)
    var = per_channel(running.var, channels, "running var", default=1.0)
    batch_var = batch.unbiased_var if unbiased else batch.var
    return Running(
        mean=(1 - new_weight) * mean + new_weight * batch.mean,
        var=(1 - new_weight) * var + new_weight * batch_var,
    )
