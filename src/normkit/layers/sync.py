"""Batch normalization over all ranks of a process group as a module."""

import copy
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import ArgumentError
from ..functional import checks
from ..functional.averages import Average, Variance
from ..functional.exchange import group_of, ranks_of
from ..functional.ghost import check_ghost_size
from ..kernels.dispatch import Activation
from ..kernels.plain import channels as plain_channels
from .batch import DEFAULT_MOMENTUM, _BatchNorm
from .tracing import path_in_graph

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    """Batch normalization of ``(N, C, *)`` with the statistics of all ranks: exact on any backend of torch.distributed.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, mean and var per channel over the batches of all ranks, in
    evaluation the running ones. The formula, the exchange and every convention stand at
    :func:`normkit.functional.sync_batch_norm`. Ranks may bring batches of any size, none included: outputs, gradients
    and running statistics are those of one process that holds all of them. ``state_dict`` is batch normalization's.

    Called with a mask it is :class:`normkit.MaskedBatchNorm1d` over ranks, for inputs of any number of positions, which
    may differ from rank to rank: ``layer(x, mask)`` counts the valid positions of all ranks and returns 0 elsewhere.

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
        process_group: the ranks that share statistics, a group of ``torch.distributed`` or a ``DeviceMesh`` of one
            dimension; None for all. A copy shares it; what is pickled, also by ``torch.save`` of the whole layer, has
            None in its place, with a warning: a group stands for connections of this process.
        device: where the state lives.
        dtype: the type of the state.
        bias: False for a layer that learns only a weight.
        decay: the weight of the **old** value; ``momentum = 1 - decay``. Refused together with momentum.
        unbiased: store the variance divided by m - 1; False divides by m.
        half_life: after how many batches one weighs half, as for :class:`normkit.BatchNorm1d`.
        average: ``"moving"`` or ``"debiased"``, likewise.
        variance: ``"batch"`` or ``"total"``, likewise, over all ranks.
        timeout: seconds to wait for the other ranks in one call; None for the group's own.
        ghost_size: each rank normalizes its batch in parts of at most so many samples, each by its own statistics, and
            the ranks share the running ones: :class:`normkit.GhostBatchNorm2d` over ranks. None for the batch of all.

    Raises:
        ArgumentError: a setting out of range, or a process group that is none.

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
    ghost_size: int | None = None

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
        ghost_size: int | None = None,
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
        if ghost_size is not None:
            check_ghost_size(ghost_size)
        self.process_group, self.timeout, self.ghost_size = group_of(process_group), timeout, ghost_size

    def _check_input_dim(self, input: Tensor) -> None:
        """Let torch's own forward, as TorchScript reads it in evaluation, take any number of dimensions."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize ``(N, C, *)``; see :func:`normkit.functional.sync_batch_norm` for formula and conventions.

        Args:
            input: ``(N, C, *)``.
            mask: boolean, ``(N, *)``; None for all True.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            # Scripted in evaluation, and put back into training.
            assert mask is None, "torch's kernel knows no masks"
            assert not self.training, "torch's kernel knows no other ranks; call eval()"
            return self._torch_forward(input)
        else:  # TorchScript compiles what follows a return
            return self.normalize(input) if mask is None else self.normalize(input, mask=mask)

    def normalize(
        self,
        input: Tensor,
        activation: Activation | None = None,
        residual: Tensor | None = None,
        inplace: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return ``activation(forward(input, mask) + residual)``; in training ``inplace`` is not made use of."""
        given: Any = input
        if isinstance(given, torch.fx.Proxy) and mask is not None and isinstance(given.tracer, torch.fx.Tracer):
            path = path_in_graph(self, given.tracer)
            return cast(Tensor, given.tracer.create_proxy("call_module", path, (given, mask), {}))
        tracked = self.track_running_stats
        running = (self.running_mean, self.running_var, self.weight, self.bias)
        if not self.training and mask is not None and not isinstance(given, torch.fx.Proxy):
            assert activation is None and residual is None, "no layer of ours has both"  # noqa: PT018
            self._check_input(input)
            y: Tensor = functional.masked_batch_norm(
                input, mask, *running, self.running_mean is None, self.momentum, self.eps, caller=self
            )
            return y
        if not self.training and self.ghost_size is not None and self.running_mean is None:
            self._check_input(input)
            size, momentum = self.ghost_size, self.momentum
            y = functional.ghost_batch_norm(input, *running, True, momentum, self.eps, ghost_size=size, caller=self)
            return plain_channels.activate(y if residual is None else y + residual, activation)
        if not self.training or isinstance(given, torch.fx.Proxy):
            return super().normalize(input, activation, residual, inplace)
        y = functional.sync_batch_norm(
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
            mask=mask,
            ghost_size=self.ghost_size,
            caller=self,
        )
        return y

    def settings_of_all_ranks(self) -> str:
        """Return what ranks compare before the first call: all that is described but group and timeout."""
        described: str = super().extra_repr()
        return described + ("" if self.ghost_size is None else f", ghost_size={self.ghost_size}")

    def extra_repr(self) -> str:
        """Return torch's description, with ghost size, process group and timeout where they are given."""
        described = self.settings_of_all_ranks()
        if self.process_group is not None:
            described += f", process_group={ranks_of(self.process_group)}"
        return described + ("" if self.timeout is None else f", timeout={self.timeout}")

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        """Copy all but the process group, which stands for connections of this process and is shared."""
        memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        return copied

    def __copy__(self) -> "SyncBatchNorm":
        copied = type(self).__new__(type(self))
        copied.__setstate__(dict(vars(self)))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Leave the process group out of what is pickled."""
        state = dict(vars(self))
        if state.get("process_group") is not None:
            warnings.warn(
                "a SyncBatchNorm is pickled without its process_group, which stands for connections of this process: "
                "loaded, it shares statistics with all; save the state_dict, or set process_group after loading",
                stacklevel=2,
            )
            state["process_group"] = None
        return state

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse what TorchScript would train without the other ranks."""
        if self.training:
            raise ArgumentError(
                "TorchScript cannot exchange statistics between ranks; call eval() before, or use "
                'normkit.convert(model, to="batch")'
            )
        return super().__prepare_scriptable__()
