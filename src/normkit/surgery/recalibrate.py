"""Give batch normalization the statistics of the data, measured and not averaged along the way."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..anatomy import Call, NormLayer, norm_layers, refuse_meta
from ..anatomy.frozen import Frozen, is_frozen, remember
from ..anatomy.select import Where
from ..errors import ArgumentError, SurgeryError
from ..functional.averages import settled
from ..layers import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    MaskedBatchNorm1d,
)
from ..layers.laws import law_of
from ..spelling import alternatives
from .collect import Pass, Seen, collect
from .moments import Intervals, Moments
from .ranks import check_group, others_hidden, refuse_differing, together
from .record import Model, Record, refuse_if_nothing_is_left
from .transaction import restored_on_error

__all__ = ["Recalibration", "recalibrate"]

# Relatives whose running statistics are those of the population, as batch normalization's are.
_RENORMS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)
_RELATIVES = (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d, MaskedBatchNorm1d, *_RENORMS)


@dataclass(frozen=True, kw_only=True, repr=False)
class Recalibration(Record[Model]):
    """The record of :func:`recalibrate`.

    Attributes:
        batches: how many batches were run in each pass.
        samples: how many samples they held.
        intervals: per layer the 95 % intervals of mean and variance.
    """

    batches: int
    samples: int
    intervals: Mapping[str, Intervals]


def recalibrate(
    model: Model,
    batches: Any,
    *,
    where: Where = None,
    samples: int | None = None,
    call: Call | None = None,
    layerwise: bool = False,
    dropout: bool = False,
    include_frozen: bool = False,
    group: Any = None,
    aggregate: Literal["pooled", "average"] = "pooled",
) -> Recalibration[Model]:
    """Replace running statistics by those of the population that ``batches`` holds.

    With ``x`` all values of a channel over all batches and positions, ``n`` of them::

        running_mean = sum(x) / n        running_var = sum((x - running_mean)^2) / (n - 1)

    accumulated in float64 and merged by counts, so that neither a short last batch nor the way the data are cut into
    batches changes the result. This is the population variance of Ioffe and Szegedy 2015, algorithm 2, with the
    variance between batches included; ``torch.optim.swa_utils.update_bn`` averages batches of any size alike and
    leaves that term out. A layer with ``unbiased=False`` or ``variance="total"`` gets the divisor n, as it stores.
    ``num_batches_tracked`` becomes the number of batches where it was smaller; with ``average="debiased"`` at least ten
    half-lives, so that batches of further training weigh what the momentum says and do not replace what was measured.
    With ``momentum=None`` further batches are averaged with those of ``batches`` one by one, whatever their sizes.

    An instance norm that keeps running statistics gets the average of its samples' means and of their unbiased
    variances. Layers of other houses are taken where the data confirm how they are read
    (:func:`normkit.register_norm`), the frozen ones of detection libraries among them: those have no other way to new
    statistics.

    Args:
        model: changed in place: only the statistics of the chosen layers.
        batches: a tensor, a DataLoader, or anything that yields tensors, tuples, lists or dicts.
        where: which layers, as for ``norm_layers``; None takes all that keep running statistics.
        samples: stop after this many, in each process; without it all batches are used.
        call: ``lambda model, batch: ...``, where a batch does not simply go into the model.
        layerwise: measure one layer after another, those before it in evaluation mode with their new statistics, so
            that each sees what it will see in use. Costs one pass over ``batches`` for each layer. Otherwise all are
            measured in one pass, in training mode.
        dropout: leave dropout on.
        include_frozen: also layers that :func:`normkit.freeze` holds still; they stay frozen.
        group: a process group of ``torch.distributed``, whose processes each bring their share of the data; then every
            one must call this, and all get the same statistics, those of all data together. The shares need not be
            of one size, also for :class:`normkit.SyncBatchNorm`: each process runs its batches by itself, and only what
            it measured is exchanged. Without a group each process sees its own batches only, and waits for no other.
        aggregate: ``"pooled"`` for the mean and variance of all values, as above; ``"average"`` for the plain averages
            of the batches' means and of their unbiased variances, batches of any size alike, as in algorithm 2 of the
            paper: the spread between batches is not counted, and is what the batches' variances lack of the pooled one.

    Returns:
        The record. ``largest_change`` is the largest shift of a mean, in standard deviations of its channel.

    Raises:
        ArgumentError: ``where`` takes nothing, a batch has an unknown form, ``samples`` is no number of samples, or
            ``aggregate`` is neither word.
        SurgeryError: there are no batches, too few samples or values, or moments that are not finite (named by batch
            and layer), another process of the group failed, or the processes differ in ``aggregate``, ``layerwise``,
            ``dropout`` or in the layers taken. Whatever is raised, also by the data or the model, the
            model is bit for bit as before.

    >>> norm = nn.BatchNorm1d(1)
    >>> record = recalibrate(norm, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]]).expand(2, 1)])
    >>> norm.running_mean, norm.running_var.round(decimals=3)
    (tensor([3.7500]), tensor([6.9170]))
    >>> print(record)
    recalibrate: 1 layer touched, exact, largest change 1.43 (standard deviations of a mean)
      touched (the model itself)
      2 batches, 4 samples
    """
    group = check_group(group)
    with together(group, "recalibrate") as share:
        if aggregate not in ("pooled", "average"):
            raise ArgumentError(f"aggregate is {aggregate!r}; {alternatives(aggregate, ('pooled', 'average'))}")
        if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
            raise ArgumentError(f"samples={samples!r}; a number of samples of at least 1, or None for all")
        chosen, refused, aside = _choose(model, where, include_frozen, layerwise)
        refuse_if_nothing_is_left("recalibrate", len(chosen), refused | aside, model, where)
        if layerwise and iter(batches) is batches:
            raise SurgeryError(
                "layerwise=True runs over the batches once for each layer, and these can be read only once; "
                "give a list or a DataLoader"
            )
        share.brought = {
            "aggregate": aggregate,
            "layerwise": layerwise,
            "dropout": dropout,
            "layers": [layer.path for layer in chosen],
            "channels": [layer.channels for layer in chosen],
        }
    refuse_differing("recalibrate", share.all)
    settings = Pass(
        batches=batches, samples=samples, call=call, dropout=dropout, group=group, averaged=aggregate == "average"
    )
    with restored_on_error(model):
        run = _one_by_one(model, chosen, settings) if layerwise else _all_at_once(model, chosen, settings)
        refused |= {layer.path: "no batch reached it" for layer in chosen if layer.path not in run.moments}
        touched = [layer for layer in chosen if layer.path in run.moments]
        refuse_if_nothing_is_left("recalibrate", len(touched), refused | aside, model, where)
        change = max(run.changes.values())
    return Recalibration(
        operation="recalibrate",
        model=model,
        touched=tuple(layer.path for layer in touched),
        refused=refused,
        largest_change=change,
        measure="standard deviations of a mean",
        exactness="exact" if layerwise or len(touched) == 1 else "approximate",
        notes=_notes(run, group),
        batches=run.batches,
        samples=run.samples,
        intervals={path: moments.intervals() for path, moments in run.moments.items()},
    )


def _notes(run: "_Run", group: Any) -> tuple[str, ...]:
    hidden = others_hidden(group)
    said = f"{run.batches} batches, {run.samples} samples"
    alone = f"of this process alone; group= pools over it and the {hidden} other processes"
    return (said, alone) if hidden else (said,)


@dataclass
class _Run:
    """What the passes over the data brought."""

    moments: dict[str, Moments] = field(default_factory=dict)
    changes: dict[str, float] = field(default_factory=dict)
    batches: int = 0
    samples: int = 0


def _all_at_once(model: nn.Module, chosen: list[NormLayer], settings: Pass) -> _Run:
    """Measure all layers in one pass, then write."""
    seen = collect(model, chosen, settings, training=True)
    run = _Run(seen.moments, {}, seen.batches, seen.samples)
    for layer in chosen:
        if layer.path in run.moments:
            run.changes[layer.path] = _write(layer, seen)
    return run


def _one_by_one(model: nn.Module, chosen: list[NormLayer], settings: Pass) -> _Run:
    """Measure and write layer after layer, in the order in which the model calls them."""
    order = collect(model, chosen, settings.first_batch(), training=False).moments
    run, by_path = _Run(), {layer.path: layer for layer in chosen}
    for path in order:
        seen = collect(model, [by_path[path]], settings, training=False)
        if path not in seen.moments:
            continue
        run.batches, run.samples = seen.batches, seen.samples
        run.moments[path] = seen.moments[path]
        run.changes[path] = _write(by_path[path], seen)
    return run


def _choose(
    model: nn.Module, where: Where, include_frozen: bool, layerwise: bool
) -> tuple[list[NormLayer], dict[str, str], dict[str, str]]:
    """Take the layers that can be recalibrated, and say why not of the others; apart of those that nobody means."""
    chosen, refused, aside = [], {}, {}
    layers = norm_layers(model, where)
    refuse_meta(model)
    for layer in layers:
        reason = _reason_against(layer, include_frozen, layerwise)
        if reason is None:
            chosen.append(layer)
        elif where is not None or layer.tracks or layer.kind in ("batch", "sync", "unknown"):
            refused[layer.path] = reason
        else:
            aside[layer.path] = reason
    return chosen, refused, aside


def _reason_against(layer: NormLayer, include_frozen: bool, layerwise: bool) -> str | None:
    module, name, form = layer.module, type(layer.module).__name__, layer.form
    if layer.lazy:
        return "it is lazy and has no channels yet; run the model once first"
    if form is None:
        return layer.unread
    if not (form.of_batch or form.method == "instance" or isinstance(module, _RELATIVES)):
        ways = "averages in a way of its own" if layer.tracks else "keeps no statistics of the population"
        return f"a {name} {ways}"
    if isinstance(module, _RENORMS) and not layerwise:
        return f"a {name} trains with its running statistics; say layerwise=True"
    if not layer.tracks:
        return "it keeps no running statistics (track_running_stats is off)"
    if is_frozen(module) and not include_frozen:
        return "it is frozen; unfreeze it, or say include_frozen=True"
    return None


def _write(layer: NormLayer, seen: Seen) -> float:
    """Write the statistics; return the largest shift of a mean in standard deviations."""
    moments, mean, variance = seen.moments[layer.path], layer.mean, layer.var
    assert mean is not None
    assert variance is not None
    average, spread = law_of(layer.module)
    # A layer that averages the total variance divides by m whatever it stores otherwise.
    measured = moments.variance(unbiased=layer.unbiased and spread != "total")
    shift = (mean.detach().double().cpu().flatten() - moments.mean) / (measured + layer.eps).sqrt()
    with torch.no_grad():
        _fill(layer, mean, moments.mean)
        _fill(layer, variance, measured)
        if layer.counter is not None:
            least = settled(layer.momentum, average)
            layer.counter.fill_(max(seen.batches, seen.counters[layer.path], least))
    if isinstance(layer.module, Frozen):
        remember(layer.module)
    change = shift.abs().max().item()
    return math.inf if math.isnan(change) else change


def _fill(layer: NormLayer, buffer: Tensor, values: Tensor) -> None:
    """Write float64 values into a buffer of any type, or say that its type has no room for them."""
    rounded = values.to(buffer.dtype).view(buffer.shape)
    if not torch.isfinite(rounded).all():
        raise SurgeryError(
            f"recalibrate: the statistics of {layer} reach {values.abs().max():.3g}, which {buffer.dtype} cannot hold"
        )
    buffer.copy_(rounded)
