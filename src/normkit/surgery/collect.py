"""One pass over the data that changes nothing and brings the moments of what chosen layers were given."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from ..anatomy import (
    Call,
    NormLayer,
    hold_statistics,
    iterate,
    preserved,
    run,
    sample_count,
    unwrapped,
    without_exchange,
)
from ..anatomy.frozen import Frozen, thaw
from ..errors import SurgeryError
from ..layers import MaskedBatchNorm1d, SyncBatchNorm
from .moments import AveragedMoments, InstanceMoments, Moments
from .ranks import together

__all__ = ["Pass", "Seen", "collect"]

# With fewer, the error of a mean is over 3 % of its standard deviation (1 / sqrt(1000)).
_ENOUGH = 1000


@dataclass(frozen=True, kw_only=True)
class Pass:
    """How the model is run over the data.

    Attributes:
        batches: the data, in any form.
        samples: stop after this many; None takes all.
        call: how a batch goes into the model.
        dropout: whether dropout is on.
        group: the processes whose data are pooled; None for this one alone.
        averaged: batches are averaged, and their values not pooled.
    """

    batches: Any
    samples: int | None = None
    call: Call | None = None
    dropout: bool = False
    group: Any = None
    averaged: bool = False

    def first_batch(self) -> "Pass":
        """Return the same pass over the first batch only."""
        return replace(self, batches=list(islice(iterate(self.batches), 1)), samples=None)


@dataclass
class Seen:
    """What a pass saw: moments by path, in the order in which the layers were first called.

    Attributes:
        moments: by path.
        batches: how many were run.
        samples: how many they held.
        counters: the layers' counters before, the largest of all processes.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    batches: int = 0
    samples: int = 0
    counters: dict[str, int] = field(default_factory=dict)

    def pool(self, other: "Seen") -> None:
        """Take in what another process saw."""
        for path, moments in other.moments.items():
            self.moments.setdefault(path, type(moments)(len(moments.mean))).pool(moments)
        self.batches += other.batches
        self.samples += other.samples
        for path, counter in other.counters.items():
            self.counters[path] = max(counter, self.counters.get(path, 0))


def collect(model: nn.Module, layers: list[NormLayer], settings: Pass, *, training: bool) -> Seen:
    """Run the model and pool what each layer is given; the model is afterwards as it was.

    Args:
        model: the module.
        layers: whose inputs are measured.
        settings: the data and how the model is run on them.
        training: whether these layers normalize with the batch's statistics meanwhile; all else is in evaluation mode.

    Raises:
        SurgeryError: no batch, too few samples, fewer than two values in a channel, or moments that are not finite.
    """
    with together(settings.group, "recalibrate") as share:
        share.brought = _own_share(model, layers, settings, training)
    seen: Seen = share.all[0]
    for other in share.all[1:]:
        seen.pool(other)
    _check(seen, layers, settings)
    return seen


def _own_share(model: nn.Module, layers: list[NormLayer], settings: Pass, training: bool) -> Seen:
    """Run this process's batches."""
    seen, (inner, _) = Seen(), unwrapped(model)
    for layer in layers:
        seen.counters[layer.path] = 0 if layer.counter is None else int(layer.counter)
    # Held, so that who watches the statistics does not take this for forwards that moved them. Without exchange, since
    # processes may have other numbers of batches; what they saw is merged at the end.
    with preserved(model), hold_statistics(model), torch.no_grad(), without_exchange(model), ExitStack() as hooks:
        _set_modes(model, layers, training, settings.dropout)
        for layer in layers:
            watch = _watch(layer, seen, training, settings.averaged)
            hooks.enter_context(_hooked(layer.module, watch))
            if training and layer.form is not None and layer.form.frozen:
                hooks.callback(layer.module.register_forward_hook(_as_in_training(layer), with_kwargs=True).remove)
        for batch in _counted(settings, seen):
            run(inner, batch, settings.call)
    return seen


def _set_modes(model: nn.Module, layers: list[NormLayer], training: bool, dropout: bool) -> None:
    """Put the chosen layers into training mode and everything else into evaluation, flag by flag.

    The flags are set and ``train()`` is not called: models override it.
    """
    for module in model.modules():
        module.training = dropout and isinstance(module, _DropoutNd)
    for layer in layers:
        if isinstance(layer.module, Frozen):
            thaw(layer.module)
        layer.module.training = training


def _watch(layer: NormLayer, seen: Seen, training: bool, averaged: bool) -> Callable[..., None]:
    """Make the hook that pools what one layer is given, before the layer sees it."""

    def pool(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values: Tensor = args[0] if args else next(iter(kwargs.values()))
        channels, per_sample = layer.channels, layer.form is not None and layer.form.method == "instance"
        unbatched = getattr(module, "_get_no_batch_dim", None) if per_sample else None
        if unbatched is not None and values.ndim == unbatched():
            values = values[None]
        if channels is None or values.ndim < 2 or values.shape[1] != channels:
            return  # the layer itself says it better
        if (
            isinstance(layer.module, (MaskedBatchNorm1d, SyncBatchNorm))
            and (mask := args[1] if args[1:] else kwargs.get("mask")) is not None
        ):
            values = values.movedim(1, -1)[mask]  # (M, C): padding is no data
        count = values.numel() // channels // (max(len(values), 1) if per_sample else 1)
        if (training or per_sample or averaged) and count == 1:
            other = 'aggregate="pooled"' if averaged and not training else "layerwise=True"
            raise SurgeryError(
                f"recalibrate: batch {seen.batches - 1} gives {layer} one value in a channel ({tuple(values.shape)}), "
                f"which has no variance to normalize with; use drop_last=True on the loader, or {other}"
            )
        kind = InstanceMoments if per_sample else AveragedMoments if averaged else Moments
        moments = seen.moments.setdefault(layer.path, kind(channels))
        moments.add(values)
        if not moments.is_finite():
            raise SurgeryError(
                f"recalibrate: batch {seen.batches - 1} gives {layer} values that are not finite or overflow "
                f"(largest magnitude {values.abs().max().item():.3g}); look for the overflow before this layer"
            )

    return pool


def _as_in_training(layer: NormLayer) -> Callable[..., Tensor]:
    """Make the hook that lets a layer without a training mode normalize with the batch: those after it see that."""

    def normalize(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        values: Tensor = args[0] if args else next(iter(kwargs.values()))
        weight, bias = (None if tensor is None else tensor.flatten() for tensor in (layer.effective_weight, layer.bias))
        normalized = functional.batch_norm(values, None, None, weight, bias, training=True, eps=layer.eps)
        for step in layer.tail:
            normalized = step(normalized)
        return normalized

    return normalize


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _counted(settings: Pass, seen: Seen) -> Iterator[Any]:
    """Yield batches until there are enough samples, counting."""
    for batch in iterate(settings.batches):
        seen.batches += 1
        seen.samples += sample_count(batch)
        yield batch
        if settings.samples is not None and seen.samples >= settings.samples:
            return


def _check(seen: Seen, layers: list[NormLayer], settings: Pass) -> None:
    """Refuse what is too little to be a population."""
    if seen.batches == 0:
        raise SurgeryError(
            "recalibrate: there are no batches; nothing was changed. An iterator that was read once is empty"
        )
    if settings.samples is not None and seen.samples < min(settings.samples, _ENOUGH):
        raise SurgeryError(
            f"recalibrate: {settings.samples} samples were asked for and the batches hold {seen.samples}; "
            f"nothing was changed. Give more data, or samples={seen.samples}"
        )
    for layer in layers:
        moments = seen.moments.get(layer.path)
        if moments is not None and moments.count < 2:
            raise SurgeryError(f"recalibrate: {layer} was given {moments.count} values in a channel; two are needed")
