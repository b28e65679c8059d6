"""Which class stands for which: torch's batch norms, ours, the synchronized one, and the classes that learn anew."""

import re
from typing import Literal

from torch import nn

from ..anatomy import NormLayer
from ..layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    MaskedBatchNorm1d,
    SyncBatchNorm,
)
from ..layers.catalog import METHODS
from .record import Exactness

__all__ = [
    "BIASED",
    "INSTANCES",
    "KINDS",
    "OURS",
    "RELATIVES",
    "SYNCS",
    "TORCHS",
    "Kind",
    "dimensions_of",
    "family_class",
    "group_count",
]

# torch's and our class by the number of spatial dimensions; 1 stands for (N, C) and (N, C, L).
TORCHS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OURS: dict[int, type[nn.Module]] = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
SYNCS = (nn.SyncBatchNorm, SyncBatchNorm)
# Those that can store the biased variance.
BIASED = (*OURS.values(), SyncBatchNorm)
INSTANCES: dict[int, type[nn.Module]] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

# What becomes a synchronized layer beside batch norms, and goes back to the class that it was.
RELATIVES: tuple[type[nn.Module], ...] = (MaskedBatchNorm1d, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)

# What convert(to=...) takes, and whether the function can be kept.
Kind = Literal["normkit", "torch", "batch", "sync", "frozen", "ghost", "renorm", "group", "layer", "instance"]
KINDS: dict[str, Exactness] = {
    "normkit": "exact",
    "torch": "exact",
    "batch": "exact",
    "sync": "exact",
    "frozen": "exact",
    "ghost": "approximate",
    "renorm": "approximate",
    "group": "retrain",
    "layer": "retrain",
    "instance": "retrain",
}

# A group of fewer channels has too few values to estimate a variance from; more than 32 groups brought nothing in
# Wu and He 2018, table 3.
_SMALLEST_GROUP, _MOST_GROUPS = 8, 32


def dimensions_of(layer: NormLayer, shape: tuple[int, ...] | None) -> int | None:
    """Return the number of spatial dimensions; 1 for ``(N, C)`` too.

    Asked in order: torch's and our classes, a shape that was seen, the shape of the layer's own state, as in
    ``(1, C, 1, 1)``, and the end of the class's name.
    """
    # A synchronized layer takes any; what it was before tells.
    cls = getattr(layer.module, "source_class", None) if isinstance(layer.module, SYNCS) else type(layer.module)
    for dimensions in TORCHS:
        if cls is not None and issubclass(cls, (TORCHS[dimensions], INSTANCES[dimensions])):
            return dimensions
    if shape is not None:
        return max(len(shape) - 2, 1)
    state = layer.mean if layer.mean is not None else layer.weight
    if state is not None and state.ndim > 1 and state.shape[1] == layer.channels:
        return max(state.ndim - 2, 1)
    named = re.search(r"([123])d$", type(layer.module).__name__, re.IGNORECASE)
    return None if named is None else int(named[1])


def group_count(channels: int) -> int:
    """Return the largest number of groups, 32 at most, that leaves eight channels or more in each.

    >>> [group_count(channels) for channels in (4, 64, 96, 512, 7)]
    [1, 8, 12, 32, 1]
    """
    fitting = [
        groups
        for groups in range(1, _MOST_GROUPS + 1)
        if channels % groups == 0 and channels // groups >= _SMALLEST_GROUP
    ]
    return max(fitting, default=1)


def family_class(name: str, dimensions: int) -> type[nn.Module] | None:
    """Return the catalog's class of a method, or None where the catalog has no such row."""
    row = next((row for row in METHODS if row.name == name), None)
    return None if row is None else row.layers.get(dimensions)
