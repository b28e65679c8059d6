"""By which law a layer keeps running statistics: the settings that batch normalization and its relatives share."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from ..functional.averages import Average, Variance, momentum_of_half_life, settled

__all__ = ["KeepsAverages", "law_in_words", "law_of", "momentum_in_words"]


class KeepsAverages:
    """Marks layers whose ``average`` and ``variance`` are the law, and not words of another house for another thing."""

    # Of objects that were saved before there were such settings, too.
    average: Any = "moving"
    variance: Any = "batch"
    # As it was given, where it was.
    half_life: Any = None

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Load, and let statistics that come without a number of batches count as settled: torch's would count as none.

        With none counted, a debiased average would let the first batch replace them.
        """
        mean, var = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        uncounted = prefix + "num_batches_tracked" not in state_dict
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]
        counter = getattr(self, "num_batches_tracked", None)
        if uncounted and isinstance(mean, Tensor) and isinstance(var, Tensor) and isinstance(counter, Tensor):
            at_start = not mean.is_meta and not bool(mean.any()) and bool((var == 1).all())
            least = settled(getattr(self, "momentum", None), self.average)
            if least and not at_start and not counter.is_meta:
                counter.fill_(least)


def law_of(layer: nn.Module) -> tuple[Average, Variance]:
    """Return by which average, and of which variance, a layer of any house keeps running statistics."""
    law = (layer.average, layer.variance) if isinstance(layer, KeepsAverages) else ("moving", "batch")
    return cast(tuple[Average, Variance], law)


def law_in_words(layer: KeepsAverages) -> str:
    """Return what a layer's description adds where the law is not torch's."""
    law = {"average": layer.average, "variance": layer.variance}
    return "".join(f", {name}={value!r}" for name, value in law.items() if value not in ("moving", "batch"))


def momentum_in_words(described: str, layer: Any) -> str:
    """Return a layer's description with the half-life that it was made with in the place of the momentum it gave."""
    if layer.half_life is None or momentum_of_half_life(layer.half_life) != layer.momentum:
        return described
    return described.replace(f"momentum={layer.momentum}", f"half_life={layer.half_life:g}", 1)
