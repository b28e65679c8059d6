"""Masked and ghost layers that are synchronized and go back: batch norms by class, with one thing more each."""

from torch import nn

from ..anatomy import NormLayer
from ..anatomy.tails import TAILED, Tailed
from ..layers import SyncBatchNorm
from .convert_classes import RELATIVES, dimensions_of, family_class
from .convert_layers import UNKNOWN, Rebuild

__all__ = ["APART", "is_relative", "of_parted", "reason_of_relative", "swap_relative", "was_relative"]

# Kinds that are told of where ranks are to share statistics, for they would go on with those of their own.
APART = ("ghost", "masked", "renorm", "whitening")


def is_relative(module: nn.Module) -> bool:
    """Say whether a layer is one of ours, and no subclass, that can be synchronized beside batch norms."""
    return type(module) in RELATIVES or (isinstance(module, Tailed) and isinstance(module, RELATIVES))


def was_relative(module: nn.Module) -> bool:
    """Say whether a synchronized layer stands for one of these."""
    before = getattr(module, "source_class", None)
    is_masked = before is not None and issubclass(before, RELATIVES)
    return isinstance(module, SyncBatchNorm) and (is_masked or module.ghost_size is not None)


def of_parted(paths: list[str], to: str) -> tuple[str, ...]:
    """Say which synchronized layers take each rank's own batch from now on, where nobody asked for that in words."""
    if not paths or to in ("sync", "batch", "frozen", "group", "layer", "instance"):
        return ()
    named = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return (f"no longer synchronized over ranks: {named}; convert(..., to='sync') makes that normkit.SyncBatchNorm",)


def _special(module: nn.Module) -> str:
    size = getattr(module, "ghost_size", None)
    return "masks" if size is None else f"ghost batches of {size} on each rank"


def reason_of_relative(layer: NormLayer, to: str) -> str | None:
    """Say what stands against a conversion of a relative or to one, or return None."""
    module = layer.module
    if to in ("normkit", "torch") and was_relative(module):
        return f"it computes what a batch norm does not, {_special(module)}; normkit.convert(model, to='batch')"
    if to == "sync" and layer.kind in APART:
        name = type(module).__name__
        return f"a {name} has no synchronized form: each rank would go on with statistics of its own"
    return None


def swap_relative(layer: NormLayer, shape: tuple[int, ...] | None, rebuild: Rebuild) -> str | None:
    """Give a masked or ghost layer its synchronized class, or a synchronized one theirs; return why not, if so."""
    module, settings = layer.module, vars(layer.module)
    if rebuild.to == "sync":
        settings["source_class"] = type(module)
        module.__class__ = TAILED[SyncBatchNorm] if isinstance(module, Tailed) else SyncBatchNorm
        settings["process_group"] = rebuild.process_group
        return None
    target = settings.get("source_class")
    if target is None or not issubclass(target, RELATIVES):
        dimensions = dimensions_of(layer, shape)
        target = None if dimensions is None else family_class("ghost", dimensions)
    if target is None:
        return UNKNOWN
    for name in ("source_class", "process_group", "timeout"):
        settings.pop(name, None)
    module.__class__ = target
    return None
