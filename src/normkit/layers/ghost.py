"""Ghost batch normalization as modules."""

import torch
from torch import Tensor

from .. import functional
from ..functional.averages import Average, Variance
from ..functional.ghost import check_ghost_size
from .batch import DEFAULT_MOMENTUM
from .running import RunningNorm

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]


class _GhostBatchNorm(RunningNorm):
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
        ghost_size: int = 32,
        decay: float | None = None,
        unbiased: bool = True,
        half_life: float | None = None,
        average: Average = "moving",
        variance: Variance = "batch",
    ) -> None:
        check_ghost_size(ghost_size)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            decay=decay,
            unbiased=unbiased,
            half_life=half_life,
            average=average,
            variance=variance,
        )
        self.ghost_size = ghost_size

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, *)``; see :func:`normkit.functional.ghost_batch_norm` for formula and conventions."""
        node = self._as_node(input)
        if node is not None:
            return node
        caller = self._caller(input)
        if caller is not None:
            self._check_input(input)
        return functional.ghost_batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self._uses_batch(),
            self.momentum,
            self.eps,
            ghost_size=self.ghost_size,
            unbiased=self.unbiased,
            num_batches_tracked=self.num_batches_tracked,
            average=self.average,
            variance=self.variance,
            caller=caller,
        )

    def extra_repr(self) -> str:
        """Describe the sizes and settings."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class GhostBatchNorm1d(_GhostBatchNorm):
    """Ghost batch normalization of ``(N, C)`` or ``(N, C, L)``: a large batch normalized in small parts.

    The formula and every convention stand at :func:`normkit.functional.ghost_batch_norm`. ``state_dict`` is that of
    batch normalization, and so is evaluation.

    Args:
        num_features: C, at least 1.
        eps: added to the variance; its unit is that of the input squared. Not negative, and not 0 in training.
        momentum: the weight of the **new** batch in the running statistics, from 0 to 1; None for the plain average.
        affine: learn weight and bias, which start at 1 and 0.
        track_running_stats: keep running statistics; without them evaluation is as training.
        device: where the state lives.
        dtype: the type of the state.
        ghost_size: the largest part, at least 1.
        decay: the weight of the **old** value; ``momentum = 1 - decay``. Refused together with momentum.
        unbiased: store the variance divided by m - 1; False divides by m.
        half_life: after how many batches one weighs half, as for :class:`normkit.BatchNorm1d`.
        average: ``"moving"`` or ``"debiased"``, likewise.
        variance: ``"batch"`` or ``"total"``, likewise.

    Raises:
        ArgumentError: a setting out of range.

    Example:
        >>> GhostBatchNorm1d(1, ghost_size=2)(torch.tensor([[1.0], [3.0], [10.0], [30.0]])).flatten().detach().round()
        tensor([-1.,  1., -1.,  1.])

    References:
        Hoffer, Hubara and Soudry, Train longer, generalize better, 2017, arXiv:1705.08741, Algorithm 1.
    """

    _ranks, _layout = (2, 3), "(N, C) or (N, C, L)"


class GhostBatchNorm2d(_GhostBatchNorm):
    """Ghost batch normalization of ``(N, C, H, W)``. Arguments are those of :class:`GhostBatchNorm1d`."""

    _ranks, _layout = (4,), "(N, C, H, W)"


class GhostBatchNorm3d(_GhostBatchNorm):
    """Ghost batch normalization of ``(N, C, D, H, W)``. Arguments are those of :class:`GhostBatchNorm1d`."""

    _ranks, _layout = (5,), "(N, C, D, H, W)"
