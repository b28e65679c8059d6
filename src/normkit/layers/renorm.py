"""Batch renormalization as modules."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import functional
from ..errors import ArgumentError
from ..functional.averages import Average, Variance
from ..functional.exported import check_not_exported
from ..functional.renorm import check_limits
from .batch import DEFAULT_MOMENTUM
from .running import RunningNorm

__all__ = ["BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d"]

Schedule = Callable[[int], tuple[float, float]]


class _BatchRenorm(RunningNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = DEFAULT_MOMENTUM,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        schedule: Schedule | None = None,
        decay: float | None = None,
        unbiased: bool = True,
        half_life: float | None = None,
        average: Average = "moving",
        variance: Variance = "batch",
    ) -> None:
        check_limits(r_max, d_max)
        if schedule is not None and not callable(schedule):
            raise ArgumentError(
                f"schedule must be a function of the number of batches seen, got {schedule!r}; "
                "pass lambda step: (r_max, d_max)"
            )
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            True,
            device,
            dtype,
            decay=decay,
            unbiased=unbiased,
            half_life=half_life,
            average=average,
            variance=variance,
        )
        self.r_max, self.d_max, self.schedule = r_max, d_max, schedule

    def limits(self) -> tuple[float, float]:
        """Return r_max and d_max for the next batch: the schedule's, or the ones that were set."""
        if self.schedule is None:
            return self.r_max, self.d_max
        assert self.num_batches_tracked is not None
        return self.schedule(int(self.num_batches_tracked))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, *)``; see :func:`normkit.functional.batch_renorm` for formula and conventions."""
        node = self._as_node(input)
        if node is not None:
            return node
        caller = self._caller(input)
        if caller is not None:
            self._check_input(input)
        elif self.schedule is not None and self.training:
            said = "torch.fx would keep the schedule's numbers of now for ever; trace a model that holds the layer"
            raise ArgumentError(f"{said}, such as nn.Sequential(layer), or set r_max and d_max")
        if self.training:
            check_not_exported(self.running_mean, caller)
        r_max, d_max = self.limits() if self.training else (self.r_max, self.d_max)
        assert self.running_mean is not None
        assert self.running_var is not None
        return functional.batch_renorm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            r_max=r_max,
            d_max=d_max,
            unbiased=self.unbiased,
            num_batches_tracked=self.num_batches_tracked,
            average=self.average,
            variance=self.variance,
            caller=caller,
        )

    def extra_repr(self) -> str:
        """Describe the sizes and settings."""
        limits = f"r_max={self.r_max}, d_max={self.d_max}" if self.schedule is None else f"schedule={self.schedule!r}"
        return f"{super().extra_repr()}, {limits}"


class BatchRenorm1d(_BatchRenorm):
    """Batch renormalization of ``(N, C)`` or ``(N, C, L)``: training's output stays near prediction's.

    The formula and every convention stand at :func:`normkit.functional.batch_renorm`. ``state_dict`` is that of batch
    normalization, and so is evaluation.

    Args:
        num_features: C, at least 1.
        eps: added to the variance; its unit is that of the input squared. Not negative, and not 0 in training.
        momentum: the weight of the **new** batch in the running statistics, from 0 to 1; None for the plain average.
        affine: learn weight and bias, which start at 1 and 0.
        device: where the state lives.
        dtype: the type of the state.
        r_max: the largest ratio of batch to running deviation, at least 1. May be set while training.
        d_max: the largest distance of batch to running mean, in running deviations, at least 0. May be set likewise.
        schedule: called with the number of batches seen so far, returns r_max and d_max of the next; the paper starts
            at ``(1, 0)``, which is batch normalization, and widens to ``(3, 5)``. It is Python that asks for a number:
            a compiled model leaves its graph there, where r_max and d_max that are set keep it whole.
        decay: the weight of the **old** value; ``momentum = 1 - decay``. Refused together with momentum.
        unbiased: store the variance divided by m - 1; False divides by m.
        half_life: after how many batches one weighs half, as for :class:`normkit.BatchNorm1d`.
        average: ``"moving"`` or ``"debiased"``, likewise.
        variance: ``"batch"`` or ``"total"``, likewise.

    Raises:
        ArgumentError: a setting out of range.

    Example:
        >>> layer = BatchRenorm1d(1, schedule=lambda step: (1.0, 0.0) if step < 1 else (3.0, 5.0))
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> layer(x).flatten().detach().round(decimals=2)
        tensor([-1.,  1.])
        >>> layer(x).flatten().detach().round(decimals=2)
        tensor([0.7600, 2.6700])

    References:
        Ioffe, Batch Renormalization, 2017, arXiv:1702.03275, Algorithm 1.
    """

    _ranks, _layout = (2, 3), "(N, C) or (N, C, L)"


class BatchRenorm2d(_BatchRenorm):
    """Batch renormalization of ``(N, C, H, W)``. Arguments and conventions are those of :class:`BatchRenorm1d`."""

    _ranks, _layout = (4,), "(N, C, H, W)"


class BatchRenorm3d(_BatchRenorm):
    """Batch renormalization of ``(N, C, D, H, W)``. Arguments and conventions are those of :class:`BatchRenorm1d`."""

    _ranks, _layout = (5,), "(N, C, D, H, W)"
