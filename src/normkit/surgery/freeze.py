"""Hold normalization layers still, in a way that ``train()`` does not undo."""

from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..anatomy import NormLayer, norm_layers, refuse_meta
from ..anatomy.evidence import bare_copy, sample_input
from ..anatomy.frozen import Frozen, frozen_class, remember, thaw
from ..anatomy.select import Where
from ..errors import ArgumentError
from ..layers import MaskedBatchNorm1d
from ..spelling import alternatives
from .record import Model, Record, refuse_if_nothing_is_left
from .transaction import restored_on_error

__all__ = ["freeze", "hold_still", "unfreeze"]

# Batch normalization's relatives in the catalog that keep running statistics.
_RELATIVES = ("renorm", "ghost", "masked", "whitening")


def freeze(
    model: Model,
    where: Where = None,
    *,
    statistics: Literal["running", "batch"] = "running",
    track: bool = False,
    affine: bool = False,
) -> Record[Model]:
    """Freeze normalization layers: three switches for each, out of the reach of ``train()`` and ``eval()``.

    ``requires_grad`` alone leaves the statistics moving, and ``eval()`` alone is undone by the next ``train()``. Here
    the layer object gets a subclass of its own class (``BatchNorm2d`` becomes ``FrozenBatchNorm2d``) whose forward is
    the same and is told other modes. The state, its names, the object, its hooks and its parameters stay, so that
    optimizers, checkpoints, copies, pickles and DistributedDataParallel do not notice; ``repr`` shows it.

    Args:
        model: changed in place.
        where: which layers, as for ``norm_layers``; None takes all that keep running statistics.
        statistics: what the layer normalizes with: ``"running"`` for the stored statistics, ``"batch"`` for the
            batch's.
        track: whether the stored statistics go on moving in forwards after ``train()``.
        affine: whether weight and bias go on learning; if not, their ``requires_grad`` is switched off.

    Returns:
        The record; the layers left alone are in ``refused``, each with the reason.

    Raises:
        ArgumentError: ``where`` takes nothing, or a switch has another value than these.
        SurgeryError: no layer can be frozen. The model is as before.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> _ = model[1].running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    >>> print(freeze(model))
    freeze: 1 layer touched, exact
      touched 1
    >>> _ = model.train()(torch.randn(8, 2))
    >>> model[1].running_mean
    tensor([1., 2., 3.])
    >>> print(str(model[1]).split("frozen")[1])
    : statistics=running, buffers still, affine still)
    """
    if statistics not in ("running", "batch"):
        raise ArgumentError(f"statistics={statistics!r}; {alternatives(statistics, ('running', 'batch'))}")
    chosen, refused, aside = [], {}, {}
    layers = norm_layers(model, where)
    refuse_meta(model)
    for layer in layers:
        reason = _reason_against(layer, statistics, track)
        if reason is None:
            chosen.append(layer)
        elif where is not None or layer.kind in ("batch", "sync", "frozen", "unknown", *_RELATIVES):
            refused[layer.path] = reason
        else:
            aside[layer.path] = reason
    refuse_if_nothing_is_left("freeze", len(chosen), refused | aside, model, where)
    with restored_on_error(model):
        for layer in chosen:
            _freeze(layer.module, statistics, track, affine)
    return Record(operation="freeze", model=model, touched=_paths(chosen), refused=refused)


def unfreeze(model: Model, where: Where = None, *, affine: bool = True) -> Record[Model]:
    """Undo :func:`freeze`: the layers get their own class back and the mode that ``train()`` last asked for.

    Args:
        model: changed in place.
        where: which layers; None takes all frozen ones.
        affine: let weight and bias learn again where freezing had stopped them; False leaves them as they are.

    Raises:
        ArgumentError: ``where`` takes nothing.
        SurgeryError: none of the layers is frozen by :func:`freeze`.

    >>> norm = nn.BatchNorm1d(2)
    >>> _ = norm.running_mean.add_(1.0)
    >>> _, _ = freeze(norm), unfreeze(norm)
    >>> norm
    BatchNorm1d(2, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    layers = norm_layers(model, where)
    chosen = [layer for layer in layers if isinstance(layer.module, Frozen)]
    others = [layer for layer in layers if not isinstance(layer.module, Frozen)]
    reasons = {layer.path: "it was not frozen by normkit.freeze" for layer in others}
    refuse_if_nothing_is_left("unfreeze", len(chosen), reasons, model, where)
    refused = {} if where is None else reasons
    with restored_on_error(model):
        for layer in chosen:
            _unfreeze(layer.module, affine)
    return Record(operation="unfreeze", model=model, touched=_paths(chosen), refused=refused)


def hold_still(module: nn.Module) -> None:
    """Freeze one layer whole: its stored statistics, its weight and its bias."""
    _freeze(module, "running", False, False)


def _freeze(module: nn.Module, statistics: str, track: bool, affine: bool) -> None:
    if isinstance(module, Frozen):
        _unfreeze(module, affine=True)
    stopped = []
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad and not affine:
            parameter.requires_grad_(False)
            stopped.append(name)
    module.__class__ = frozen_class(type(module))
    assert isinstance(module, Frozen)
    module.frozen_statistics, module.frozen_track, module.frozen_parameters = statistics, track, tuple(stopped)
    remember(module)


def _unfreeze(module: nn.Module, affine: bool) -> None:
    assert isinstance(module, Frozen)
    if affine:
        for name, parameter in module.named_parameters(recurse=False):
            if name in module.frozen_parameters:
                parameter.requires_grad_(True)
    thaw(module)


def _reason_against(layer: NormLayer, statistics: str, track: bool) -> str | None:
    """Say why a layer cannot be frozen, or return None."""
    module, form = layer.module, layer.form
    if form is not None and form.frozen:
        return "it is a frozen layer of another library already"
    if layer.kind == "unknown" or (form is None and not isinstance(module, _BatchNorm | _InstanceNorm)):
        return layer.unread
    relative = form is not None and form.method in _RELATIVES
    keeps = isinstance(module, _BatchNorm | _InstanceNorm) or (form is not None and form.of_batch) or relative
    if not keeps:
        return (
            f"a {type(module).__name__} keeps no running statistics; stop its weight and bias by requires_grad_(False)"
        )
    if layer.lazy:
        return "it is lazy and has no statistics yet; run the model once first"
    if form is None:
        return f"{type(module).__name__} has a forward of its own, which need not heed a frozen mode: {layer.unread}"
    if not layer.tracks:
        return "it keeps no running statistics (track_running_stats is off)"
    # A synchronized layer of masked or ghost batches is one of them.
    relative = relative or getattr(module, "ghost_size", None) is not None
    relative = relative or issubclass(getattr(module, "source_class", None) or nn.Module, MaskedBatchNorm1d)
    if relative and (statistics == "batch" or track):
        asked = "track=True" if track else "statistics='batch'"
        return f"a {type(module).__name__} is frozen with its running statistics, held still; {asked} is not for it"
    reason = _reason_against_statistics(layer) if statistics == "running" else None
    return reason or (_reason_against_modes(layer, statistics, track) if layer.overridden else None)


def _reason_against_modes(layer: NormLayer, statistics: str, track: bool) -> str | None:
    """Freeze a copy of a layer of another house, train it for a step, and say what it did not heed."""
    name = type(layer.module).__name__
    if track:
        return f"a {name} is of another house: only torch's and our own go on tracking once frozen"
    assert layer.form is not None
    work = bare_copy(layer.module)
    x = sample_input(work, layer.form)
    if x is None or isinstance(work, nn.SyncBatchNorm):
        return None if isinstance(work, nn.SyncBatchNorm) and statistics == "running" else f"a {name} cannot be tried"
    _freeze(work, statistics, track, affine=False)
    before = [
        tensor.clone()
        for tensor in (layer.form.tensor(work, "mean"), layer.form.tensor(work, "var"))
        if tensor is not None
    ]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        work.train()(x)
    after = [
        tensor for tensor in (layer.form.tensor(work, "mean"), layer.form.tensor(work, "var")) if tensor is not None
    ]
    if all(torch.equal(one, other) for one, other in zip(before, after, strict=True)):
        return None
    return f"{name} has a forward of its own, which does not heed a frozen mode"


def _reason_against_statistics(layer: NormLayer) -> str | None:
    """Say what is wrong with the stored statistics, or return None."""
    mean, variance = layer.mean, layer.var
    if variance is None:
        # A whitening layer's, whose stored covariance holds them.
        variance = layer.module._buffers["running_covariance"]
        assert variance is not None
        variance = variance.diagonal(dim1=-2, dim2=-1)
    assert mean is not None
    if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()) or (variance < 0).any():
        return "its running statistics are not finite or negative; normkit.repair or normkit.recalibrate it first"
    if not mean.any() and bool((variance == 1).all()):
        return (
            "its running statistics are the initial 0 and 1: normalizing with them does nothing; "
            "load weights, train, or normkit.recalibrate first"
        )
    return None


def _paths(layers: list[NormLayer]) -> tuple[str, ...]:
    return tuple(layer.path for layer in layers)
