"""Micro-batches one after another, each normalized by itself, that move the running statistics once together."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..axes import values_per_channel
from ..errors import ArgumentError
from ..functional.exchange import exchange_of
from ..functional.pooled import merge_parts, normalize_pooled
from ..kernels.repeated import in_backward, is_repeated, may_be_repeated
from ..layers import SyncBatchNorm
from .norm_calls import NormCall, Running, answered, pooled_norms
from .pooling import Updates, pool_calls, stores_unbiased

__all__ = ["Apart"]


class Apart:
    """What the norms of a model saw in each micro-batch of a step.

    Args:
        model: whose batch norms they are.
        parts: how many micro-batches.
        updates: takes what the running statistics are to be moved by.
    """

    def __init__(self, model: nn.Module, parts: int, updates: Updates) -> None:
        self._layers = pooled_norms(model, exactly=False)
        self._updates = updates
        # Each micro-batch exchanges by itself: ranks with other numbers of them would meet in different ones.
        self._agreed = ("accumulate", "statistics", parts)
        self._place = -1
        # By layer: for each of its calls in a forward, the statistics of that call in each micro-batch.
        self._seen: dict[Any, list[tuple[Running, list[tuple[Tensor, Tensor, int]]]]] = {}
        self._calls: dict[Any, int] = {}

    def answered(self) -> Any:
        """Let the norms' calls come here, inside."""
        return answered(self._layers, self._answer)

    def begin(self) -> None:
        """Begin the next micro-batch."""
        self._calls = {}
        self._place += 1

    def end(self) -> None:
        """Hand on what all micro-batches together move the running statistics by, one update for each call."""
        for layer, calls in self._seen.items():
            for running, parts in calls:
                mean, var, count = merge_parts(parts)
                stored = var * (count / (count - 1)) if stores_unbiased(layer) else var
                self._updates.add(layer, running, mean, stored, count)

    def _answer(self, call: NormCall) -> Tensor:
        if not call.tracks:
            return call.ordinary()
        layer, again = call.layer, in_backward() and is_repeated()
        exchanged = isinstance(layer, SyncBatchNorm) and exchange_of(layer.process_group, layer.timeout) is not None
        if exchanged and not again:
            pool = pool_calls([call], [may_be_repeated()], self._agreed)
            if layer.ghost_size is None:
                y = normalize_pooled([call.input], layer.weight, layer.bias, [call.residual], pool)[0]
            else:
                # The ranks share what is stored; the parts of a batch are each rank's own.
                with _untracked(layer):
                    y = call.ordinary()
            seen = (pool.mean, pool.var, pool.count)
        else:
            count = values_per_channel(tuple(call.input.shape))
            if count == 1:
                raise ArgumentError(
                    f"accumulate: micro-batch {self._place} brings {call} one value per channel, which by itself has "
                    'no variance; make it larger, or use kind="exact", which normalizes all micro-batches together'
                )
            with _fresh_statistics(layer) as (mean, var):
                y = call.ordinary()
            biased = var.double() * ((count - 1) / count) if stores_unbiased(layer) and count else var
            seen = (mean.double(), biased.double(), count)
        if not again and seen[2]:
            self._note(layer, call.running, seen)
        return y

    def _note(self, layer: Any, running: Running, seen: tuple[Tensor, Tensor, int]) -> None:
        place = self._calls.get(layer, 0)
        self._calls[layer] = place + 1
        calls = self._seen.setdefault(layer, [])
        if place == len(calls):
            calls.append((running, []))
        calls[place][1].append(seen)


@contextlib.contextmanager
def _untracked(layer: Any) -> Iterator[None]:
    """Let a layer store nothing, inside."""
    attributes = vars(layer)
    kept = attributes["track_running_stats"]
    attributes["track_running_stats"] = False
    try:
        yield
    finally:
        attributes["track_running_stats"] = kept


@contextlib.contextmanager
def _fresh_statistics(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Let a layer store the statistics of the call inside, and nothing of before, in tensors of their own.

    The kernel computes them anyway; to compute them again would cost a pass over memory.
    """
    buffers, attributes = layer._buffers, vars(layer)
    kept = {name: buffers[name] for name in ("running_mean", "running_var", "num_batches_tracked")}
    momentum = attributes["momentum"]
    for name, buffer in kept.items():
        if buffer is not None:
            buffers[name] = torch.zeros_like(buffer)
    attributes["momentum"] = 1.0
    try:
        yield buffers["running_mean"], buffers["running_var"]
    finally:
        buffers.update(kept)
        attributes["momentum"] = momentum
