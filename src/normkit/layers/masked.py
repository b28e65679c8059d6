"""Masked batch normalization as a module."""

from torch import Tensor

from .. import functional
from .running import RunningNorm

__all__ = ["MaskedBatchNorm1d"]


class MaskedBatchNorm1d(RunningNorm):
    """Batch normalization of padded sequences ``(N, C, L)``: padding takes no part in the statistics.

    The formula and every convention stand at :func:`normkit.functional.masked_batch_norm`. ``state_dict`` is that of
    batch normalization. Called with the input alone it is batch normalization.

    Args:
        num_features: C, at least 1.
        eps: added to the variance; its unit is that of the input squared. Not negative, and not 0 in training.
        momentum: the weight of the **new** batch in the running statistics, from 0 to 1; None for the plain average.
        affine: learn weight and bias, which start at 1 and 0.
        track_running_stats: keep running statistics; without them the batch's own are used in evaluation too.
        device: where the state lives.
        dtype: the type of the state.
        decay: the weight of the **old** value; ``momentum = 1 - decay``. Refused together with momentum.
        unbiased: store the variance divided by m - 1; False divides by m.
        half_life: after how many batches one weighs half, as for :class:`normkit.BatchNorm1d`.
        average: ``"moving"`` or ``"debiased"``, likewise.
        variance: ``"batch"`` or ``"total"``, likewise.

    Raises:
        ArgumentError: a setting out of range.

    Example:
        >>> import torch
        >>> x, lengths = torch.tensor([[[1.0, 3.0, 999.0]]]), torch.tensor([2])
        >>> mask = torch.arange(3) < lengths[:, None]
        >>> MaskedBatchNorm1d(1)(x, mask).detach().round()
        tensor([[[-1.,  1.,  0.]]])
    """

    _ranks, _layout = (2, 3), "(N, C) or (N, C, L)"

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize where the mask is True; see :func:`normkit.functional.masked_batch_norm`.

        Args:
            input: ``(N, C, L)`` or ``(N, C)``.
            mask: boolean, ``(N, L)`` or ``(N,)``; None for all True.
        """
        node = self._as_node(input, mask)
        if node is not None:
            return node
        caller = self._caller(input)
        if caller is not None:
            self._check_input(input)
        return functional.masked_batch_norm(
            input,
            mask,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self._uses_batch(),
            self.momentum,
            self.eps,
            unbiased=self.unbiased,
            num_batches_tracked=self.num_batches_tracked,
            average=self.average,
            variance=self.variance,
            caller=caller,
        )
