"""Build the layer that takes another's place, with what the old one learnt and what hangs on it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..anatomy import NormLayer
from ..anatomy.attributes import leaves, plain_attributes
from ..anatomy.tails import TAILED, Tailed, tail_modules
from ..errors import ArgumentError
from .convert_classes import BIASED, INSTANCES, KINDS, OURS, dimensions_of, family_class, group_count
from .freeze import hold_still

__all__ = ["UNKNOWN", "Rebuild", "carried", "held_unseen", "put", "rebuilt", "renamed"]

_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
UNKNOWN = "its class does not say how many dimensions its input has; give example="


@dataclass(frozen=True)
class Rebuild:
    """What a conversion was asked for.

    Attributes:
        to: the new form.
        groups: the number of groups, for ``"group"``.
        process_group: for ``"sync"``.
    """

    to: str
    groups: int | None
    process_group: Any


def carried(layer: NormLayer, cls: type[nn.Module]) -> nn.Module | str:
    """Return a batch norm of torch's or ours that computes what a layer of another house does, or why there is none.

    Parameters stay the objects that they are where they have torch's shape; a frozen layer's buffers become parameters
    of a layer that :func:`normkit.freeze` holds still, so that ``unfreeze`` lets them learn.
    """
    assert layer.channels is not None
    assert layer.form is not None
    if not layer.unbiased and cls not in BIASED and not layer.form.frozen:
        return "it stores the biased variance, which torch's layers cannot; convert it to 'normkit'"
    new = _with_tail(cls(layer.channels), layer)
    new.eps = layer.eps  # type: ignore[assignment]
    new.momentum = layer.momentum  # type: ignore[assignment]
    if not layer.unbiased and not layer.form.frozen:
        new.unbiased = False  # type: ignore[assignment]
    for name in ("weight", "bias"):
        new.register_parameter(name, _parameter(layer, name))
    if new._parameters["weight"] is None and new._parameters["bias"] is None:
        new.affine = False  # type: ignore[assignment]
    device = None if layer.mean is None else layer.mean.device
    for name, value in (("running_mean", layer.mean), ("running_var", layer.var)):
        new.register_buffer(name, None if value is None else value.detach().flatten())
    counter = torch.tensor(0, device=device) if layer.counter is None else layer.counter
    new.register_buffer("num_batches_tracked", None if layer.mean is None else counter)
    flag = layer.tracks and bool(vars(layer.module).get("track_running_stats", True))
    new.track_running_stats = flag  # type: ignore[assignment]
    _hang_on(layer.module, new)
    if layer.form.frozen:
        hold_still(new)
    return new


def rebuilt(layer: NormLayer, shape: tuple[int, ...] | None, rebuild: Rebuild) -> nn.Module | str:
    """Return the new layer, or the reason why there is none."""
    dimensions = dimensions_of(layer, shape)
    tailed = layer
    if not isinstance(layer.module, nn.modules.batchnorm._BatchNorm) or layer.tail:
        # Through a batch norm of ours, which has the names that the rest of this reads.
        assert layer.form is not None
        bare = carried(replace(layer, form=replace(layer.form, tail=(), frozen=False)), OURS[dimensions or 1])
        if isinstance(bare, str):
            return bare
        layer = replace(layer, module=bare.train(layer.module.training))
    new = _built(layer, shape, dimensions, rebuild)
    if isinstance(new, str):
        return new
    new = _with_tail(new, tailed)
    old = layer.module
    for names, own in ((old._parameters, new._parameters), (old._buffers, new._buffers)):
        for name, value in names.items():
            if name in own:
                own[name] = value  # type: ignore[assignment]  # the two dicts differ in what they hold
    _hang_on(tailed.module, new)
    return new


def _parameter(layer: NormLayer, name: str) -> nn.Parameter | None:
    """Return a weight or bias of shape ``(C,)``: the layer's own object, or a new one with what it computes with."""
    value = layer.effective_weight if name == "weight" else layer.bias
    if value is None or (isinstance(value, nn.Parameter) and value.ndim == 1):
        return value
    held = layer.weight if name == "weight" else layer.bias
    learns = value.requires_grad or not isinstance(held, nn.Parameter)
    return nn.Parameter(value.detach().flatten(), requires_grad=learns)


def _with_tail(new: nn.Module, layer: NormLayer) -> nn.Module:
    """Give a new layer what the old one calls after it, under the same names."""
    names = () if layer.form is None else layer.form.tail
    kept = [(name, module) for name in names for module in tail_modules(layer.module, (name,))]
    if kept:
        new.__class__ = TAILED[type(new)]
        assert isinstance(new, Tailed)
        for name, module in kept:
            setattr(new, name, module)
        new.tail_names = tuple(name for name, _ in kept)
    return new


def _hang_on(old: nn.Module, new: nn.Module) -> None:
    """Give a new layer the hooks and the mode of the old one."""
    for name in _HOOK_DICTS:
        getattr(new, name).update(getattr(old, name))
    new.training = old.training


def _built(
    layer: NormLayer, shape: tuple[int, ...] | None, dimensions: int | None, rebuild: Rebuild
) -> nn.Module | str:
    """Build the bare layer, or say why not."""
    channels, affine = layer.channels, layer.module._parameters.get("weight") is not None
    eps = float(str(layer.module.eps))
    assert channels is not None, "only a lazy layer has none"
    if rebuild.to in ("group", "layer"):
        groups = 1 if rebuild.to == "layer" else _groups(layer, channels, rebuild.groups)
        if groups == channels and (shape is None or len(shape) == 2) and dimensions == 1:
            return f"{groups} groups of one channel erase vectors (each value minus itself is 0); take fewer groups"
        return nn.GroupNorm(groups, channels, eps=eps, affine=affine)
    if dimensions is None:
        return UNKNOWN
    if rebuild.to == "instance":
        if dimensions == 1 and (shape is None or len(shape) == 2):
            return "instance normalization of vectors (N, C) erases them; show by example= if it is (N, C, L)"
        return INSTANCES[dimensions](channels, eps=eps, affine=affine)
    return _from_catalog(layer, rebuild.to, channels, dimensions)


def _groups(layer: NormLayer, channels: int, wanted: int | None) -> int:
    if wanted is None:
        return group_count(channels)
    if wanted < 1 or channels % wanted:
        fitting = [number for number in range(1, channels + 1) if channels % number == 0]
        raise ArgumentError(f"groups={wanted} does not divide the {channels} channels of {layer}; {fitting} do")
    return wanted


def _from_catalog(layer: NormLayer, to: str, channels: int, dimensions: int) -> nn.Module | str:
    """Build a method of the family by its row of the catalog."""
    cls = family_class(to, dimensions)
    if cls is None:
        return f"the catalog has no {to!r} for {dimensions} spatial dimensions; convert knows {', '.join(KINDS)}"
    new = cls(channels)
    for name in ("eps", "momentum", "track_running_stats", "affine", "unbiased", "average", "variance", "ghost_size"):
        said = hasattr(new, name) and hasattr(layer.module, name)
        # A synchronized layer has a ghost size only where it was a ghost layer.
        if said and not (name == "ghost_size" and layer.module.ghost_size is None):
            setattr(new, name, getattr(layer.module, name))
    return new


def renamed(layer: NormLayer) -> list[str]:
    """Say which names of the state are others now."""
    assert layer.form is not None
    words = (("weight", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var"))
    changed = [f"{old} is {new}" for what, new in words if (old := getattr(layer.form, what)) != new]
    return [f"names in the state of {layer.path}: {', '.join(changed)} now"] if changed else []


def put(work: nn.Module, layer: NormLayer, new: nn.Module | str, unseen: Mapping[int, str]) -> str | None:
    """Put a new layer in the place of another, under all its names; return why not, if so.

    Args:
        work: the model.
        layer: the one that is replaced.
        new: what replaces it, or why there is nothing.
        unseen: of :func:`held_unseen`.
    """
    if isinstance(new, str):
        return new
    if "" in layer.names:
        return "it is the model itself, which cannot be replaced in itself; put it into a Sequential"
    if id(layer.module) in unseen:
        return (
            f"the model's code holds it in {unseen[id(layer.module)]} too, which torch is not shown, and would go on "
            "calling the old layer; make that an nn.ModuleList or nn.ModuleDict, or look the layer up where it is used"
        )
    for name in layer.names:
        holder, _, own = name.rpartition(".")
        work.get_submodule(holder)._modules[own] = new
    return None


def held_unseen(work: nn.Module) -> dict[int, str]:
    """Return where plain attributes, lists and dicts of a model's code hold modules, by the modules' ``id``."""
    return {
        id(held): f"{path}.{name}" if path else name
        for path, module in work.named_modules()
        for name, value in plain_attributes(module)
        for held in leaves(value)
        if isinstance(held, nn.Module)
    }
