"""Build the layer that takes another's place, with what the old one learnt and what hangs on it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..anatomy import NormLayer
from ..errors import ArgumentError
from .convert_classes import INSTANCES, KINDS, dimensions_of, family_class, group_count

__all__ = ["Rebuild", "rebuilt"]

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


def rebuilt(layer: NormLayer, shape: tuple[int, ...] | None, rebuild: Rebuild) -> nn.Module | str:
    """Return the new layer, or the reason why there is none."""
    new = _built(layer, shape, rebuild)
    if isinstance(new, str):
        return new
    old = layer.module
    for names, own in ((old._parameters, new._parameters), (old._buffers, new._buffers)):
        for name, value in names.items():
            if name in own:
                own[name] = value  # type: ignore[assignment]  # the two dicts differ in what they hold
    for name in _HOOK_DICTS:
        getattr(new, name).update(getattr(old, name))
    return new.train(old.training)


def _built(layer: NormLayer, shape: tuple[int, ...] | None, rebuild: Rebuild) -> nn.Module | str:
    """Build the bare layer, or say why not."""
    channels, affine = layer.channels, layer.module._parameters.get("weight") is not None
    eps = float(str(layer.module.eps))
    assert channels is not None, "only a lazy layer has none"
    if rebuild.to in ("group", "layer"):
        groups = 1 if rebuild.to == "layer" else _groups(layer, channels, rebuild.groups)
        if groups == channels and (shape is None or len(shape) == 2) and dimensions_of(layer.module, shape) == 1:
            return f"{groups} groups of one channel erase vectors (each value minus itself is 0); take fewer groups"
        return nn.GroupNorm(groups, channels, eps=eps, affine=affine)
    dimensions = dimensions_of(layer.module, shape)
    if dimensions is None:
        return "its class does not say how many dimensions its input has; give example="
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
    for name in ("eps", "momentum", "track_running_stats", "affine"):
        if hasattr(new, name) and hasattr(layer.module, name):
            setattr(new, name, getattr(layer.module, name))
    return new
