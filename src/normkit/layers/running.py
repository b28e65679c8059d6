"""What batch normalization's relatives share: its parameters, its running statistics, and the checks around them."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..functional import checks
from ..functional.averages import Average, Variance, check_average
from .batch import DEFAULT_MOMENTUM, resolve_momentum, resolve_num_features
from .laws import KeepsAverages, law_in_words, momentum_in_words
from .tracing import Unscriptable

__all__ = ["RunningNorm"]


class RunningNorm(KeepsAverages, Unscriptable, nn.modules.batchnorm._NormBase):
    """Weight, bias, running mean, running variance and a counter, named and saved as batch normalization's.

    It is no subclass of torch's batch normalization: tools that replace every one of those would change what is
    computed in training.
    """

    _ranks: ClassVar[tuple[int, ...]]
    _layout: ClassVar[str]
    unbiased: bool = True

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
        decay: float | None = None,
        unbiased: bool = True,
        half_life: float | None = None,
        average: Average = "moving",
        variance: Variance = "batch",
    ) -> None:
        checks.check_eps(eps)
        weighed = resolve_momentum(momentum, decay, half_life)
        check_average(average, variance, weighed)
        size = resolve_num_features(num_features)
        super().__init__(size, eps, weighed, affine, track_running_stats, device, dtype)
        self.unbiased, self.average, self.variance = unbiased, average, variance
        if half_life is not None:
            self.half_life = half_life

    def _check_shape(self, input: Tensor) -> None:
        checks.check_input(input, self)
        checks.check_rank(input, self._ranks, self._layout, self)
        checks.check_channels(input, self.num_features, self)

    def _uses_batch(self) -> bool:
        """Tell whether the batch's own statistics are used: in training, and where there are no others."""
        return self.training or self.running_mean is None

    def extra_repr(self) -> str:
        """Return torch's description, with the stored variance named where it is not torch's."""
        described = momentum_in_words(super().extra_repr(), self)
        return described + ("" if self.unbiased else ", unbiased=False") + law_in_words(self)
