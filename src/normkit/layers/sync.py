"""Batch normalization over all ranks of a process group as a module."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import ArgumentError
from ..functional import checks
from ..functional.averages import Average, Variance
from ..kernels.dispatch import Activation
from .batch import DEFAULT_MOMENTUM, _BatchNorm

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    """Batch normalization of ``(N, C, *)`` with the statistics of all ranks: exact on any backend of torch.distributed.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, mean and var per channel over the batches of all ranks, in
    evaluation the running ones. The formula, the exchange and every convention stand at
    :func:`normkit.functional.sync_batch_norm`. Ranks may bring batches of any size, none included: outputs, gradients
    and running statistics are those of one process that holds all of them. ``state_dict`` is batch normalization's.

    Every rank must call the same layers in the same order, forward and backward. Where they do not, or one is gone, the
    others get an error that names the layer; with ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` it names the call of each rank, at
    the cost of a second exchange in every call. In evaluation nothing is exchanged.

    It is no subclass of ``torch.nn.SyncBatchNorm``, which data parallelism refuses on a CPU. TorchScript, forward
    mode and the transforms of torch.func are refused in training. ``torch.compile`` breaks its graph at the layer.

    Args:
        num_features: C, at least 1.
        eps: added to the variance; its unit is that of the input squared. Not negative, and not 0 in training.
        momentum: the weight of the **new** batch in the running statistics, from 0 to 1; None for the plain average.
        affine: learn weight and bias, which start at 1 and 0.
        track_running_stats: keep running statistics; without them the batch's own are used in evaluation too, each
            rank's by itself, as in torch.
        process_group: the ranks that share statistics; None for all.
        device: where the state lives.
        dtype: the type of the state.
        bias: False for a layer that learns only a weight.
        decay: the weight of the **old** value; ``momentum = 1 - decay``. Refused together with momentum.
        unbiased: store the variance divided by m - 1; False divides by m.
        half_life: after how many batches one weighs half, as for :class:`normkit.BatchNorm1d`.
        average: ``"moving"`` or ``"debiased"``, likewise.
        variance: ``"batch"`` or ``"total"``, likewise, over all ranks.
        timeout: seconds to wait for the other ranks in one call; None for the group's own.

    Raises:
        ArgumentError: a setting out of range.

    Example:
        Without a process group it is batch normalization::

            >>> SyncBatchNorm(1)(torch.tensor([[1.0], [3.0]])).flatten().detach().round()
            tensor([-1.,  1.])

    References:
        Peng et al., MegDet: A Large Mini-Batch Object Detector, 2018, arXiv:1711.07240, section 3.2.
    """

    # Whichever there are: only dimension 1 has a role.
    _ranks, _layout = tuple(range(2, 26)), "(N, C, *)"
    _torch_layer = nn.SyncBatchNorm
    process_group: Any = None
    timeout: float | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = DEFAULT_MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        decay: float | None = None,
        unbiased: bool = True,
        half_life: float | None = None,
        average: Average = "moving",
        variance: Variance = "batch",
        timeout: float | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            decay=decay,
            unbiased=unbiased,
            half_life=half_life,
            average=average,
            variance=variance,
        )
        if timeout is not None:
            checks.check_number("timeout", timeout, 60.0)
            if not timeout > 0:
                raise ArgumentError(f"timeout must be above 0 seconds, got {timeout}; None is the group's own")
        self.process_group, self.timeout = process_group, timeout

    def _check_input_dim(self, input: Tensor) -> None:
        """Let torch's own forward, as TorchScript reads it in evaluation, take any number of dimensions."""

    def normalize(
        self, input: Tensor, activation: Activation | None = None, residual: Tensor | None = None, inplace: bool = False
    ) -> Tensor:
        """Return ``activation(forward(input) + residual)``; in training ``inplace`` is not made use of."""
        given: object = input
        if not self.training or isinstance(given, torch.fx.Proxy):
            return super().normalize(input, activation, residual, inplace)
        tracked = self.track_running_stats
        y: Tensor = functional.sync_batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            True,
            self.momentum,
            self.eps,
            unbiased=self.unbiased,
            num_batches_tracked=self.num_batches_tracked if tracked else None,
            activation=activation,
            residual=residual,
            process_group=self.process_group,
            timeout=self.timeout,
            average=self.average,  # type: ignore[arg-type]
            variance=self.variance,  # type: ignore[arg-type]
            caller=self,
        )
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        """Copy all but the process group, which stands for connections of this process and is shared."""
        memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        return copied

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse what TorchScript would train without the other ranks."""
        if self.training:
            raise ArgumentError(
                "TorchScript cannot exchange statistics between ranks; call eval() before, or use "
                'normkit.convert(model, to="batch")'
            )
        return super().__prepare_scriptable__()
