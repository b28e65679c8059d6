"""Instance normalization as modules: torch's classes, with our function below them."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import ArgumentError
from ..functional import checks
from ..functional.averages import Average, Variance, check_average
from .batch import DEFAULT_MOMENTUM, resolve_momentum, resolve_num_features
from .laws import KeepsAverages, law_in_words, momentum_in_words
from .tracing import TracedAsTorch, torch_forward

__all__ = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]


class _InstanceNorm(KeepsAverages, TracedAsTorch, nn.modules.instancenorm._InstanceNorm):
    """What the three layers share. State only: the arithmetic is functional.instance_norm."""

    _rank: ClassVar[int]
    _layout: ClassVar[str]
    average: str = "moving"
    _torch_forward = torch_forward(nn.modules.instancenorm._InstanceNorm)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = DEFAULT_MOMENTUM,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        half_life: float | None = None,
        average: Average = "moving",
        variance: Variance = "batch",
    ) -> None:
        size = resolve_num_features(num_features)
        checks.check_eps(eps)
        weighed = resolve_momentum(momentum, None, half_life)
        check_average(average, "batch", weighed)
        if variance != "batch":
            raise ArgumentError(
                f"variance={variance!r}: an instance norm stores the average of its samples' own variances, and the "
                "spread of their means, which it takes out, is no part of that; leave variance out"
            )
        rate: Any = weighed  # None too, which torch's layer takes for 0
        super().__init__(size, eps, rate, affine, track_running_stats, device, dtype)
        self.average = average
        if half_life is not None:
            self.half_life = half_life
        if affine and not bias:
            # torch before 2.13 has no bias= of its own.
            self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, *)`` or ``(C, *)``; see :func:`normkit.functional.instance_norm`."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            stored = self.average == "moving" or not self.track_running_stats
            assert stored or not self.training, "torch's kernel cannot store these statistics; call eval()"
            return self._torch_forward(input)
        else:  # TorchScript compiles what follows a return
            node = self._as_node(input)
            if node is not None:
                return node
            if self._caller(input) is None:
                return self._normalize(input, None)
            self._check_input(input)
            if input.dim() == self._rank:
                return self._normalize(input, self)
            return self._normalize(input.unsqueeze(0), self).squeeze(0)

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse what torch's kernel, which TorchScript runs, cannot store."""
        if self.training and self.track_running_stats and self.average != "moving":
            raise ArgumentError(
                f"TorchScript runs torch's own kernel, which cannot store average={self.average!r}; call eval()"
            )
        return self

    def extra_repr(self) -> str:
        """Return torch's description, with the law named where it is not torch's."""
        return momentum_in_words(super().extra_repr(), self) + law_in_words(self)

    def _check_shape(self, input: Tensor) -> None:
        checks.check_input(input, self)
        checks.check_rank(input, (self._rank - 1, self._rank), self._layout, self)
        batch = input if input.dim() == self._rank else input.unsqueeze(0)
        checks.check_channels(batch, self.num_features, self)

    def _normalize(self, batch: Tensor, caller: nn.Module | None) -> Tensor:
        return functional.instance_norm(
            batch,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
            num_batches_tracked=self.num_batches_tracked,
            average=self.average,  # type: ignore[arg-type]
            caller=caller,
        )


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """Instance normalization of ``(N, C, L)`` or ``(C, L)``: every channel of every sample over its positions.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``. The formula and every convention stand at
    :func:`normkit.functional.instance_norm`. ``state_dict`` is torch's, in both directions.

    Args:
        num_features: C, at least 1.
        eps: added to the variance; its unit is that of the input squared. Not negative.
        momentum: the weight of the **new** batch in the running statistics, from 0 to 1.
        affine: learn weight and bias; by default the layer learns nothing.
        track_running_stats: keep running statistics, and use them in evaluation; by default there are none.
        device: where the state lives.
        dtype: the type of the state.
        bias: False for a layer that learns only a weight.
        half_life: after how many batches one weighs half, as for :class:`normkit.BatchNorm1d`.
        average: ``"moving"`` or ``"debiased"``, likewise; the counter then moves, which torch's layer leaves at 0.
        variance: ``"batch"``, and nothing else: the average of the samples' own variances.

    Raises:
        ArgumentError: num_features, eps or momentum out of range.

    Example:
        >>> InstanceNorm1d(1)(torch.tensor([[[1.0, 3.0]], [[10.0, 30.0]]])).round().flatten()
        tensor([-1.,  1., -1.,  1.])

    References:
        Ulyanov, Vedaldi and Lempitsky, Instance Normalization, 2016, arXiv:1607.08022, equation (2).
    """

    _rank, _layout, _torch_layer = 3, "(N, C, L) or (C, L)", nn.InstanceNorm1d


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """Instance normalization of ``(N, C, H, W)`` or ``(C, H, W)``.

    Arguments, conventions and errors are those of :class:`InstanceNorm1d`.
    """

    _rank, _layout, _torch_layer = 4, "(N, C, H, W) or (C, H, W)", nn.InstanceNorm2d


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """Instance normalization of ``(N, C, D, H, W)`` or ``(C, D, H, W)``.

    Arguments, conventions and errors are those of :class:`InstanceNorm1d`.
    """

    _rank, _layout, _torch_layer = 5, "(N, C, D, H, W) or (C, D, H, W)", nn.InstanceNorm3d
