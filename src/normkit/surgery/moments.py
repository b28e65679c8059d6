"""Mean and variance of all values a layer ever saw, pooled over batches in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AveragedMoments", "InstanceMoments", "Intervals", "Moments"]

# The 97.5 % quantile of the normal distribution: an interval of 95 %.
_QUANTILE = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """The 95 % confidence interval of each channel's mean and variance, each bound of shape ``(C,)``.

    The unit of independence is the sample, since values inside one image go together.
    """

    mean_low: Tensor
    mean_high: Tensor
    variance_low: Tensor
    variance_high: Tensor


class Moments:
    """Pooled moments per channel of tensors ``(N, C, *)``.

    Batches are merged by their counts, with the variance between batches included (Chan, Golub and LeVeque 1979)::

        d     = mean_b - mean
        mean <- mean + d * n_b / (n + n_b)
        M2   <- M2 + M2_b + d^2 * n * n_b / (n + n_b)

    so that the result is that of all values at once, however they were cut into batches. Beside the values, the first
    and second moment of each sample about the first batch's mean are pooled in the same way, for the intervals.

    >>> pooled = Moments(1)
    >>> pooled.add(torch.tensor([[1.0], [2.0]]))
    >>> pooled.add(torch.tensor([[6.0]]))
    >>> pooled.count, pooled.mean, pooled.variance(unbiased=True)
    (3, tensor([3.], dtype=torch.float64), tensor([7.], dtype=torch.float64))
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)
        self._center: Tensor | None = None
        # Per sample: a, the mean of (x - center), and b, the mean of its square. Their means and co-moments.
        self._samples = 0
        self._pair_mean = torch.zeros(2, channels, dtype=torch.float64)
        self._pair_squares = torch.zeros(2, 2, channels, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Pool one batch ``(N, C, *)``."""
        rows = values.detach().double().flatten(2) if values.ndim > 2 else values.detach().double().unsqueeze(-1)
        count = rows.shape[0] * rows.shape[2]
        if count == 0:
            return
        variance, mean = torch.var_mean(rows, (0, 2), correction=0)
        self._merge(count, mean.cpu(), variance.cpu() * count)
        if self._center is None:
            self._center = mean.cpu()
        shifted = rows - self._center.to(mean.device)[:, None]
        self._merge_samples(torch.stack((shifted.mean(2), shifted.square().mean(2))).cpu())

    def pool(self, other: "Moments") -> None:
        """Take in what another process or another part of the data brought; exact, whatever its size.

        >>> first, second, whole = Moments(1), Moments(1), Moments(1)
        >>> parts = torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0], [7.0], [9.0]])
        >>> first.add(parts[0]), second.add(parts[1]), whole.add(torch.cat(parts))
        (None, None, None)
        >>> first.pool(second)
        >>> first.count, first.mean, torch.allclose(first.intervals().variance_low, whole.intervals().variance_low)
        (5, tensor([5.], dtype=torch.float64), True)
        """
        if other.count == 0 or other._center is None:
            return
        self._merge_all(other)
        if self._center is None:
            self._center = other._center
        # The other's pairs are about its own center; a -> a + d and b -> b + 2 d a + d^2 is linear in the pair.
        d = (other._center - self._center).cpu()
        a, b = other._pair_mean
        (aa, ab), (_, bb) = other._pair_squares
        cross = ab + 2 * d * aa
        squares = torch.stack((torch.stack((aa, cross)), torch.stack((cross, bb + 4 * d * ab + 4 * d.square() * aa))))
        self._merge_pairs(other._samples, torch.stack((a + d, b + 2 * d * a + d.square())), squares)

    def variance(self, *, unbiased: bool) -> Tensor:
        """Return the pooled variance, divided by n - 1 or by n."""
        return self._squares / (self.count - 1 if unbiased else self.count)

    def is_finite(self) -> bool:
        """Say whether every moment so far is finite."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self._squares).all())

    def intervals(self) -> Intervals:
        """Return the intervals; with a single sample they are infinitely wide.

        The variance is b - a^2 in the means of the pairs, so to first order it varies as b - 2 a_mean a.
        """
        mean, variance = self.mean, self.variance(unbiased=True)
        if self._samples < 2:
            wide = torch.full_like(mean, torch.inf)
            return Intervals(mean_low=-wide, mean_high=wide, variance_low=torch.zeros_like(mean), variance_high=wide)
        covariance = self._pair_squares / (self._samples - 1) / self._samples
        first = self._pair_mean[0]
        spread = covariance[1, 1] - 4 * first * covariance[0, 1] + 4 * first.square() * covariance[0, 0]
        mean_error = _QUANTILE * covariance[0, 0].clamp_min(0).sqrt()
        variance_error = _QUANTILE * spread.clamp_min(0).sqrt()
        return Intervals(
            mean_low=mean - mean_error,
            mean_high=mean + mean_error,
            variance_low=(variance - variance_error).clamp_min(0),
            variance_high=variance + variance_error,
        )

    def _merge_all(self, other: "Moments") -> None:
        self._merge(other.count, other.mean, other._squares)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self._squares = self._squares + squares + difference.square() * (self.count * count / total)
        self.count = total

    def _merge_samples(self, pairs: Tensor) -> None:
        """Pool pairs of shape ``(2, N, C)``."""
        count = pairs.shape[1]
        mean = pairs.mean(1)
        apart = pairs - mean[:, None]
        self._merge_pairs(count, mean, torch.einsum("inc,jnc->ijc", apart, apart))

    def _merge_pairs(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total, difference = self._samples + count, mean - self._pair_mean
        between = difference[:, None] * difference[None, :] * (self._samples * count / total)
        self._pair_squares = self._pair_squares + squares + between
        self._pair_mean = self._pair_mean + difference * (count / total)
        self._samples = total


class AveragedMoments(Moments):
    """The plain averages over batches of their means and of their variances, whatever the batches' sizes.

    This is algorithm 2 of Ioffe and Szegedy 2015: ``E[mean_b]`` and ``E[m / (m - 1) * var_b]``. The spread of the batch
    means is not counted. The intervals are as wide as those of all values pooled.

    >>> averaged = AveragedMoments(1)
    >>> averaged.add(torch.tensor([[0.0], [2.0]]))
    >>> averaged.add(torch.tensor([[9.0], [10.0], [14.0]]))
    >>> averaged.mean, averaged.variance(unbiased=True)
    (tensor([6.], dtype=torch.float64), tensor([4.5000], dtype=torch.float64))
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self._batches = 0
        # Of the variances divided by m, and by m - 1.
        self._variances = torch.zeros(2, channels, dtype=torch.float64)

    def variance(self, *, unbiased: bool) -> Tensor:
        """Return the average of the batches' variances."""
        return self._variances[int(unbiased)]

    def is_finite(self) -> bool:
        """Say whether both averages so far are finite."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self._variances).all())

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        self._average(1, count, mean, torch.stack((squares / count, squares / (count - 1))))

    def _merge_all(self, other: Moments) -> None:
        assert isinstance(other, AveragedMoments)
        self._average(other._batches, other.count, other.mean, other._variances)

    def _average(self, batches: int, count: int, mean: Tensor, variances: Tensor) -> None:
        self._batches, self.count = self._batches + batches, self.count + count
        share = batches / self._batches
        self.mean = self.mean + (mean - self.mean) * share
        self._variances = self._variances + (variances - self._variances) * share


class InstanceMoments(Moments):
    """What an instance norm that keeps running statistics averages: the mean and variance of each sample.

    With the mean and the unbiased variance of each sample's channel over its positions, as torch stores them::

        running_mean = average over samples of mean        running_var = average over samples of variance

    >>> pooled = InstanceMoments(1)
    >>> pooled.add(torch.tensor([[[1.0, 3.0]], [[10.0, 14.0]]]))
    >>> pooled.mean, pooled.variance(unbiased=True)
    (tensor([7.], dtype=torch.float64), tensor([5.], dtype=torch.float64))
    """

    def add(self, values: Tensor) -> None:
        """Pool one batch ``(N, C, *)``."""
        rows = values.detach().double().flatten(2)
        if rows.numel() == 0:
            return
        variance, mean = torch.var_mean(rows, 2, correction=1)
        self.count += rows.shape[0] * rows.shape[2]
        self._center = torch.zeros(rows.shape[1], dtype=torch.float64)
        self._merge_samples(torch.stack((mean, variance)).cpu())
        self.mean, self._squares = self._pair_mean[0], self._pair_mean[1]

    def pool(self, other: Moments) -> None:
        """Take in what another process brought."""
        if other.count:
            self.count += other.count
            self._center = other._center
            self._merge_pairs(other._samples, other._pair_mean, other._pair_squares)
            self.mean, self._squares = self._pair_mean[0], self._pair_mean[1]

    def variance(self, *, unbiased: bool) -> Tensor:
        """Return the average of the samples' variances, which are unbiased as torch's are."""
        return self._squares

    def intervals(self) -> Intervals:
        """Return the intervals; with a single sample they are infinitely wide."""
        wide = torch.full_like(self.mean, torch.inf)
        spread = self._pair_squares / (self._samples - 1) / self._samples if self._samples > 1 else None
        mean_error = wide if spread is None else _QUANTILE * spread[0, 0].clamp_min(0).sqrt()
        variance_error = wide if spread is None else _QUANTILE * spread[1, 1].clamp_min(0).sqrt()
        return Intervals(
            mean_low=self.mean - mean_error,
            mean_high=self.mean + mean_error,
            variance_low=(self._squares - variance_error).clamp_min(0),
            variance_high=self._squares + variance_error,
        )
