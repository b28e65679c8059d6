"""What a folding does: which norm goes into which layer, or into which layers beside each other."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anatomy import Affine
from .fold_own import Way

__all__ = ["Pair", "Place", "are_as"]


@dataclass(frozen=True)
class Pair:
    """A norm and the layer that absorbs it.

    Attributes:
        norm: the path of the norm.
        neighbour: the path of the layer.
        norm_is_after: the norm stands after the layer, else before it.
        affine: what the layer absorbs, over its own channels.
        way: how, where the layer's class is not torch's.
        known_from: the block whose traced code shows the pair, ``""`` for the whole model; None where only runs do.
        others: the same norm with the other layers whose outputs are concatenated before it; each absorbs its channels.
    """

    norm: str
    neighbour: str
    norm_is_after: bool
    affine: Affine
    way: Way
    known_from: str | None
    others: "tuple[Pair, ...]" = ()

    @property
    def parts(self) -> "tuple[Pair, ...]":
        """One for each layer that absorbs a part of the norm."""
        return (self, *self.others)


@dataclass(frozen=True)
class Place:
    """A layer that a norm stands beside.

    Attributes:
        layer: the layer.
        size: how many channels it gives, or takes where it stands after the norm.
        channels: which of the layer's channels each of the norm's is; None where they are the same.
        taken: which of the norm's channels are the layer's; None where all are.
    """

    layer: nn.Module
    size: int
    channels: Tensor | None
    taken: Tensor | None = None

    def is_as(self, other: "Place") -> bool:
        """Say whether another place is the same."""
        same = self.layer is other.layer and _equal(self.channels, other.channels)
        return same and _equal(self.taken, other.taken)

    def share_of(self, affine: Affine) -> Affine | str:
        """Return the part of a norm's map that is over the layer's channels."""
        if self.taken is None:
            return affine
        if affine.mixing is not None:
            return "it mixes channels, and what stands before it is a concatenation"
        return Affine(affine.scale[self.taken], affine.shift[self.taken])


def are_as(first: list[Place], second: list[Place]) -> bool:
    """Say whether two calls stand beside the same layers, with the same channels."""
    return len(first) == len(second) and all(one.is_as(other) for one, other in zip(first, second, strict=True))


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)
