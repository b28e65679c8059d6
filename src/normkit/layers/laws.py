"""By which law a layer keeps running statistics: the settings that batch normalization and its relatives share."""

from typing import Any, cast

from torch import nn

from ..functional.averages import Average, Variance

__all__ = ["KeepsAverages", "law_in_words", "law_of"]


class KeepsAverages:
    """Marks layers whose ``average`` and ``variance`` are the law, and not words of another house for another thing."""

    # Of objects that were saved before there were such settings, too.
    average: Any = "moving"
    variance: Any = "batch"


def law_of(layer: nn.Module) -> tuple[Average, Variance]:
    """Return by which average, and of which variance, a layer of any house keeps running statistics."""
    law = (layer.average, layer.variance) if isinstance(layer, KeepsAverages) else ("moving", "batch")
    return cast(tuple[Average, Variance], law)


def law_in_words(layer: KeepsAverages) -> str:
    """Return what a layer's description adds where the law is not torch's."""
    law = {"average": layer.average, "variance": layer.variance}
    return "".join(f", {name}={value!r}" for name, value in law.items() if value not in ("moving", "batch"))
