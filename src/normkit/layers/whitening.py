"""Whitening batch normalization as modules."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional
from ..functional import checks
from ..functional.averages import Average, Variance, check_average
from ..functional.whitening import check_whitening
from .batch import DEFAULT_MOMENTUM, resolve_momentum, resolve_num_features
from .laws import KeepsAverages, law_in_words
from .tracing import Unscriptable

__all__ = ["WhiteningBatchNorm1d", "WhiteningBatchNorm2d", "WhiteningBatchNorm3d"]


class _WhiteningBatchNorm(KeepsAverages, Unscriptable):
    _ranks: ClassVar[tuple[int, ...]]
    _layout: ClassVar[str]
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_covariance: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = DEFAULT_MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_groups: int = 1,
        shrinkage: float = 0.0,
        iterations: int | None = None,
        decay: float | None = None,
        unbiased: bool = True,
        half_life: float | None = None,
        average: Average = "moving",
        variance: Variance = "batch",
    ) -> None:
        self.num_features = resolve_num_features(num_features)
        checks.check_eps(eps, positive=True)
        self.momentum = resolve_momentum(momentum, decay, half_life)
        check_average(average, variance, self.momentum)
        check_whitening(num_features, num_groups, shrinkage, iterations)
        super().__init__()
        self.eps, self.affine, self.track_running_stats, self.unbiased = eps, affine, track_running_stats, unbiased
        self.average, self.variance = average, variance
        self.num_groups, self.shrinkage, self.iterations = num_groups, shrinkage, iterations
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(num_features, **made)) if affine else None)
        size = num_features // num_groups
        mean, covariance = torch.empty(num_features, **made), torch.empty(num_groups, size, size, **made)
        self.register_buffer("running_mean", mean if track_running_stats else None)
        self.register_buffer("running_covariance", covariance if track_running_stats else None)
        counter = torch.tensor(0, dtype=torch.long, device=device)
        self.register_buffer("num_batches_tracked", counter if track_running_stats else None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Start again from mean 0 and the identity."""
        if self.running_mean is not None and self.running_covariance is not None:
            self.running_mean.zero_()
            self.running_covariance.copy_(torch.eye(self.running_covariance.shape[-1]))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Start again from weight 1, bias 0 and fresh running statistics."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Whiten ``(N, C, *)``; see :func:`normkit.functional.whitening_batch_norm` for formula and conventions."""
        node = self._as_node(input)
        if node is not None:
            return node
        caller = self._caller(input)
        if caller is not None:
            self._check_input(input)
        return functional.whitening_batch_norm(
            input,
            self.running_mean,
            self.running_covariance,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            self.momentum,
            self.eps,
            num_groups=self.num_groups,
            shrinkage=self.shrinkage,
            iterations=self.iterations,
            unbiased=self.unbiased,
            num_batches_tracked=self.num_batches_tracked,
            average=self.average,
            variance=self.variance,
            caller=caller,
        )

    def _check_shape(self, input: Tensor) -> None:
        checks.check_input(input, self)
        checks.check_rank(input, self._ranks, self._layout, self)
        checks.check_channels(input, self.num_features, self)

    def extra_repr(self) -> str:
        """Describe the sizes and settings."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, num_groups={self.num_groups}, "
            f"shrinkage={self.shrinkage}, iterations={self.iterations}"
            f"{'' if self.unbiased else ', unbiased=False'}{law_in_words(self)}"
        )


class WhiteningBatchNorm1d(_WhiteningBatchNorm):
    """Whitening batch normalization of ``(N, C)`` or ``(N, C, L)``: channels are also made uncorrelated.

    The formula and every convention stand at :func:`normkit.functional.whitening_batch_norm`. Kept for prediction are
    the mean and the covariance, not a whitening matrix: an average of inverse roots is no inverse root of an average.

    Args:
        num_features: C, at least 1.
        eps: added to the variances; its unit is that of the input squared. Positive.
        momentum: the weight of the **new** batch in the running statistics, from 0 to 1; None for the plain average.
        affine: learn weight and bias, which start at 1 and 0.
        track_running_stats: keep running statistics; without them the batch's own are used in evaluation too.
        device: where the state lives.
        dtype: the type of the state.
        num_groups: a divisor of num_features; channels of a group are whitened together.
        shrinkage: from 0 to 1: how far the covariance is drawn to a multiple of the identity.
        iterations: Newton steps, at least 1; None takes the eigenvectors.
        decay: the weight of the **old** value; ``momentum = 1 - decay``. Refused together with momentum.
        unbiased: store the covariance divided by m - 1; False divides by m.
        half_life: after how many batches one weighs half, as for :class:`normkit.BatchNorm1d`.
        average: ``"moving"`` or ``"debiased"``, likewise.
        variance: ``"batch"`` or ``"total"``, likewise, of the whole covariance.

    Raises:
        ArgumentError: a setting out of range.

    Example:
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.0], [1.0, 2.0], [2.0, 1.0]])
        >>> WhiteningBatchNorm1d(2)(x).detach().round()
        tensor([[-1., -1.],
                [ 1.,  1.],
                [-1.,  1.],
                [ 1., -1.]])

    References:
        Huang, Yang, Lang and Deng, Decorrelated Batch Normalization, 2018, arXiv:1804.08450, section 3.
    """

    _ranks, _layout = (2, 3), "(N, C) or (N, C, L)"


class WhiteningBatchNorm2d(_WhiteningBatchNorm):
    """Whitening batch normalization of ``(N, C, H, W)``. Arguments are those of :class:`WhiteningBatchNorm1d`."""

    _ranks, _layout = (4,), "(N, C, H, W)"


class WhiteningBatchNorm3d(_WhiteningBatchNorm):
    """Whitening batch normalization of ``(N, C, D, H, W)``. Arguments are those of :class:`WhiteningBatchNorm1d`."""

    _ranks, _layout = (5,), "(N, C, D, H, W)"
