"""Moments of what a layer was given, pooled over all batches in float64, with their standard errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["BatchPlan", "Company", "Lengthened", "Measured", "Padding", "PooledMoments", "independent_values"]

_BATCHES_WANTED = 10  # whose spread is worth more than what is reckoned from the samples


class PooledMoments:
    """Mean and variance per channel over every value seen, and what the number of samples leaves uncertain.

    The variance is of the pooled values, so it holds the spread between batches too. The values of one sample are
    correlated (neighbouring pixels are alike), so the standard errors come from the spread of per-sample means, never
    from the number of values. Sums run in float64 around the first batch's mean, where nothing cancels.

    Args:
        beside: moments to share the origin of, so that both can be pooled.

    >>> moments = PooledMoments()
    >>> moments.add(torch.tensor([[1.0], [2.0], [3.0]]))
    >>> moments.add(torch.tensor([[6.0]]))
    >>> moments.mean.item(), round(moments.var.item(), 4)
    (3.0, 4.6667)
    """

    def __init__(self, beside: "PooledMoments | None" = None) -> None:
        self.samples = 0
        self.values = 0
        self.nonfinite_batches = 0
        self._batches: list[
            tuple[int, Tensor, Tensor]
        ] = []  # samples, mean from the origin and biased variance of each
        self._origin: Tensor | None = None if beside is None else beside._origin
        self._sums: Tensor | None = None  # (7, C): sums of w, w^2, w d, w d^2, w a, w a^2, w a d

    @classmethod
    def pooled(cls, parts: "Sequence[PooledMoments]") -> "PooledMoments":
        """Return the moments of all values of parts that share an origin."""
        total = cls(parts[0] if parts else None)
        for part in parts:
            total.samples += part.samples
            total.values += part.values
            total.nonfinite_batches += part.nonfinite_batches
            total._batches += part._batches
            if part._sums is not None:
                total._sums = part._sums if total._sums is None else total._sums + part._sums
        return total

    def add(self, batch: Tensor) -> None:
        """Take in one input ``(N, C, *)``; a batch with NaN or infinities is counted and left out."""
        values = batch.detach().to(torch.float64).reshape(batch.shape[0], batch.shape[1], -1)  # (N, C, L)
        if not values.numel():
            return
        if not bool(torch.isfinite(values).all()):
            self.nonfinite_batches += 1
            return
        variance, mean = torch.var_mean(values, dim=2, correction=0)  # (N, C)
        if self._origin is None:
            self._origin = mean.mean(0)
        if self._sums is None:
            self._sums = torch.zeros(7, values.shape[1], dtype=torch.float64, device=values.device)
        weight, distance = float(values.shape[2]), mean - self._origin
        second = variance + distance**2  # of the sample's values around the origin
        terms = (distance, distance**2, second, second**2, second * distance)
        counts = [torch.full_like(self._origin, values.shape[0] * weight**power) for power in (1, 2)]
        self._sums += torch.stack(counts + [weight * term.sum(0) for term in terms])
        self._batches.append((values.shape[0], distance.mean(0), second.mean(0) - distance.mean(0) ** 2))
        self.samples += values.shape[0]
        self.values += values.shape[0] * values.shape[2]

    def __bool__(self) -> bool:
        return self.values > 1

    @property
    def mean(self) -> Tensor:
        """The mean of all values, ``(C,)``."""
        origin, sums = self._state()
        return origin + sums[2] / sums[0]

    @property
    def var(self) -> Tensor:
        """The unbiased variance of all values, ``(C,)``."""
        _, sums = self._state()
        biased = (sums[4] / sums[0] - (sums[2] / sums[0]) ** 2).clamp_min(0.0)
        return biased * (self.values / max(self.values - 1, 1))

    @property
    def mean_error(self) -> Tensor:
        """The standard error of the mean, ``(C,)``."""
        _, sums = self._state()
        spread = sums[3] / sums[0] - (sums[2] / sums[0]) ** 2
        return (spread.clamp_min(0.0) * self._inverse_samples()).sqrt()

    @property
    def var_error(self) -> Tensor:
        """The standard error of the variance, ``(C,)``."""
        _, sums = self._state()
        d, dd, a, aa, ad = (sums[2:] / sums[0]).unbind(0)
        spread = (aa - a**2) + 4 * d**2 * (dd - d**2) - 4 * d * (ad - a * d)
        return (spread.clamp_min(0.0) * self._inverse_samples()).sqrt()

    def batch_spread(self, samples: int) -> Tensor:
        """The standard deviation of the variance of a batch of so many samples, over that variance, ``(C,)``.

        Of ten batches of this size and more it is what they show, of fewer what the differences between samples let
        expect: in both, values that go together count as what they are.
        """
        seen = [variance for size, _, variance in self._batches if size == samples]
        if len(seen) >= _BATCHES_WANTED:
            variances = torch.stack(seen)
            return variances.std(0) / variances.mean(0).clamp_min(torch.finfo(torch.float64).tiny)
        _, sums = self._state()
        effective = sums[0] ** 2 / sums[1] - 1.0
        return self.var_error * (effective / samples).sqrt() / self.var.clamp_min(torch.finfo(torch.float64).tiny)

    def batch_mean_spread(self, samples: int) -> Tensor:
        """The standard deviation of the mean of a batch of so many samples, over that of the values, ``(C,)``.

        As for `batch_spread`. Behind another norm batch means lie closer together than samples let expect: that norm
        has given every batch the same mean.
        """
        deviation = self.var.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        seen = [mean for size, mean, _ in self._batches if size == samples]
        if len(seen) >= _BATCHES_WANTED:
            return torch.stack(seen).std(0) / deviation
        _, sums = self._state()
        effective = sums[0] ** 2 / sums[1] - 1.0
        return self.mean_error * (effective / samples).sqrt() / deviation

    @property
    def effective_samples(self) -> float:
        """How many samples of equal size say as much as these: ``(sum w)^2 / sum w^2`` of their sizes w (Kish 1965)."""
        _, sums = self._state()
        return float((sums[0] ** 2 / sums[1]).max())

    def _inverse_samples(self) -> Tensor:
        """One over the effective number of samples, less one for the mean that was taken from them."""
        _, sums = self._state()
        return 1.0 / (sums[0] ** 2 / sums[1] - 1.0).clamp_min(1e-9)

    def _state(self) -> tuple[Tensor, Tensor]:
        assert self._origin is not None
        assert self._sums is not None
        return self._origin, self._sums


def independent_values(spread: float, values: int) -> float:
    """Return as how many independent values of a normal distribution those of a batch count, at most as what they are.

    By how much the variance varies from batch to batch: ``1 + 2 / spread^2``.

    >>> independent_values(0.5, 100), independent_values(0.01, 100)
    (9.0, 100.0)
    """
    return min(1 + 2 / max(spread, 1e-9) ** 2, float(values))


@dataclass
class Padding:
    """Trailing runs of identical vectors in inputs ``(N, C, L)``.

    Attributes:
        shares: per batch, the mean share of positions that such runs take.
        ragged: whether runs differ in length within a batch.
        valid: moments of what lies before the runs.
    """

    shares: list[float] = field(default_factory=list)
    ragged: bool = False
    valid: PooledMoments = field(default_factory=PooledMoments)


@dataclass
class Measured:
    """What one layer was given while the model ran on the batches.

    Attributes:
        calls: moments by call site: the first, second, ... call of the layer in one forward.
        with_dropout: the same with dropout on, where the model has any.
        sizes: ``(samples, values per channel)`` of every call of one batch.
        padding: of inputs of three dimensions.
        dtypes: the types of the inputs.
        domains: moments by the label that the user gave the samples.
    """

    calls: list[PooledMoments] = field(default_factory=list)
    with_dropout: PooledMoments | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)
    padding: Padding | None = None
    dtypes: set[torch.dtype] = field(default_factory=set)
    domains: dict[str, PooledMoments] = field(default_factory=dict)

    @property
    def pooled(self) -> PooledMoments:
        """Moments of all calls, dropout off."""
        return PooledMoments.pooled(self.calls)

    @property
    def values_per_sample(self) -> int:
        """How many values of a channel one sample brings, in the largest call seen."""
        return max((values // max(samples, 1) for samples, values in self.sizes), default=0)


@dataclass(frozen=True, kw_only=True)
class Lengthened:
    """What more padding does to one layer.

    Attributes:
        moved: the largest change of its output at positions that hold data, in standard deviations of the output.
        share: the share of padded positions in the batch that was tried.
    """

    moved: float
    share: float


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How many samples the batches hold.

    Attributes:
        regular: samples of a regular batch.
        last: samples of the last one.
        for_training: whether the batches look made for training: a loader that shuffles.
    """

    regular: int
    last: int
    for_training: bool


@dataclass(frozen=True, kw_only=True)
class Company:
    """One sample's output alone and in two batches, in evaluation mode.

    Attributes:
        difference: the largest relative L2 difference of the outputs.
        layer: the first normalization layer whose input agreed and whose output did not, where there is one.
        layer_differences: the relative difference of each layer's output.
        low_precision: computed on an accelerator or below float32.
    """

    difference: float
    layer: str | None
    layer_differences: Mapping[str, float]
    low_precision: bool
