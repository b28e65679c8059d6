"""What micro-batches normalize with, and what a step leaves in the running statistics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..anatomy.hold import tell_of_update
from ..errors import ArgumentError
from ..functional.agreement import SyncCall
from ..functional.averages import update_statistics
from ..functional.exchange import exchange_of
from ..functional.ghost import check_parts
from ..functional.inplace import is_recorded
from ..functional.pooled import Pool, check_total, local_statistics, merge_parts
from ..functional.sync import channels_of, check_part, keep_pool, pool_of_ranks
from ..layers import SyncBatchNorm
from ..layers.laws import law_of
from .norm_calls import NormCall, Running

__all__ = ["Updates", "pool_calls", "stores_unbiased"]


def stores_unbiased(layer: Any) -> bool:
    """Tell whether a layer stores each batch's variance divided by m - 1."""
    return bool(getattr(layer, "unbiased", True)) and law_of(layer)[1] == "batch"


class Updates:
    """What running statistics are moved by, once the step has come to its end: until then nothing has changed."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Any, Running, Tensor, Tensor, int]] = []

    def add(self, layer: Any, running: Running, mean: Tensor, stored: Tensor, count: int) -> None:
        """Note an update of what one layer held in its call."""
        self._waiting.append((layer, running, mean, stored, count))

    def apply(self) -> None:
        """Make the updates, in the order of the calls."""
        for layer, running, mean, stored, count in self._waiting:
            momentum = layer.momentum
            if momentum is None and running[2] is None:
                momentum = 0.0
            assert running[0] is not None
            assert running[1] is not None
            update_statistics(running[0], running[1], running[2], mean, stored, momentum, *law_of(layer))
            if running[0] is layer.running_mean:
                tell_of_update(layer, count)


def pool_calls(calls: Sequence[NormCall], repeated: Sequence[bool], agreed: tuple[object, ...] = ()) -> Pool:
    """Return the statistics of what all these calls of one layer are to normalize, over its ranks too.

    Args:
        calls: one for each micro-batch.
        repeated: for each, whether a backward may run it again: then its statistics are kept for that.
        agreed: what the ranks must have in common beside the layer's settings.
    """
    first, layer = calls[0], calls[0].layer
    is_torchs = type(layer).__module__.startswith("torch.")
    synchronized = isinstance(layer, SyncBatchNorm) and layer.training
    exchange = exchange_of(layer.process_group, layer.timeout) if synchronized else None
    if is_torchs and isinstance(layer, torch.nn.SyncBatchNorm) and exchange_of(layer.process_group, None) is not None:
        said = "torch.nn.SyncBatchNorm exchanges by itself in every micro-batch"
        raise ArgumentError(f'accumulate: {first}: {said}; use normkit.convert(model, to="sync")')

    recorded = any(is_recorded(call.input, call.weight, call.bias, call.residual) for call in calls)
    differentiated = recorded and any(call.input.requires_grad for call in calls)

    def check() -> None:
        for call in calls:
            _check_call(call)

    if exchange is None:
        check()
        own = [local_statistics(call.input) for call in calls]
        mean, var, count = merge_parts(own)
        check_total(count, "micro-batches", layer)
        pool = Pool(mean, var, count, differentiated, SyncCall(None, layer.eps, first.activation, str(first), -1.0))
    else:
        weight, bias = layer.weight, layer.bias
        law = (layer.unbiased, layer.average, layer.variance)
        settings = (layer.momentum, layer.eps, *law, layer.running_mean is None, weight is None, bias is None, *agreed)
        own, pool = pool_of_ranks(
            [call.input for call in calls],
            check,
            recorded,
            exchange,
            layer.eps,
            first.activation,
            settings,
            channels_of(first.input, layer.running_mean, weight, bias, layer),
            first.input.device,
            layer,
        )
    for statistics, kept in zip(own, repeated, strict=True):
        if kept:
            keep_pool(layer, [statistics], pool)
    return pool


def _check_call(call: NormCall) -> None:
    """Refuse what the layer itself would refuse, but for a micro-batch of one value per channel."""
    layer, tracked = call.layer, call.tracks
    call.check_dimensions()
    given = (
        layer.running_mean if tracked else None,
        layer.running_var if tracked else None,
        layer.weight,
        layer.bias,
        True,
        layer.momentum if layer.num_batches_tracked is not None or layer.momentum is not None else 0.0,
        layer.eps,
        layer.num_batches_tracked if tracked else None,
        layer,
    )
    channels = channels_of(call.input, layer.running_mean, layer.weight, layer.bias, layer)
    check_part(call.input, call.residual, channels, call.activation, given)
    size = getattr(layer, "ghost_size", None)
    if size is not None and call.input.numel():
        check_parts(call.input, size, layer)
