"""What the checks look at: one normalization layer, from a model or from a file of weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..anatomy import NormLayer, norm_layers
from ..anatomy.frozen import is_frozen
from ..errors import ArgumentError
from ..layers import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

__all__ = ["Subject", "subjects_of_model", "subjects_of_state"]

@dataclass(frozen=True)
class Names:
    """Under which names a layer keeps its state."""

    weight: str = "weight"
    bias: str = "bias"
    mean: str = "running_mean"
    var: str = "running_var"


_RENORMS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)
_FIELDS = ("running_mean", "running_var", "weight", "bias", "num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One layer's state and settings; what a file of weights cannot know is None.

    Attributes:
        name: the layer's path, or the prefix of its keys.
        kind: as in :class:`normkit.anatomy.NormLayer`; ``"state"`` for a file.
        layer: the layer in the model, or None for a file.
        running_mean, running_var, weight, bias: ``(C,)``, detached.
        updates: ``num_batches_tracked`` as a number.
        eps, momentum: the settings; momentum None is the cumulative average.
        training: what the layer's forward is told; None for a file.
        tracks: it has running statistics and uses them.
        eps_assumed: nobody said eps: a file of weights does not hold it.
    """

    name: str
    kind: str
    layer: NormLayer | None
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    updates: int | None
    eps: float
    momentum: Any
    training: bool | None
    tracks: bool
    eps_assumed: bool = False

    @property
    def is_batch(self) -> bool:
        """Whether the layer takes its statistics over the batch, as far as is known."""
        return self.kind in {"batch", "sync", "ghost", "renorm", "state"} or (self.kind == "frozen" and self.tracks)

    @property
    def moves(self) -> bool:
        """Whether a forward now would write the running statistics."""
        if self.layer is None or not self.tracks:
            return False
        module = self.layer.module
        wished = bool(vars(module).get("training", module.training))
        return wished and (not is_frozen(module) or bool(getattr(module, "frozen_track", True)))

    @property
    def affine(self) -> list[nn.Parameter]:
        """The layer's own parameters."""
        return [] if self.layer is None else list(self.layer.module.parameters(recurse=False))

    @property
    def held_still(self) -> bool:
        """Whether the layer has an affine part and none of it learns."""
        return bool(self.affine) and not any(parameter.requires_grad for parameter in self.affine)

    @property
    def names(self) -> Names:
        """The names of weight, bias and statistics."""
        return Names()

    @property
    def accessor(self) -> str:
        """Python that reaches the layer from ``model``; the name is written in where findings are joined."""
        return "model.get_submodule({layer})"

    @property
    def recalibration(self) -> str:
        """Python that gives the layer the statistics of the data, with what this kind of layer needs beside them."""
        if self.layer is not None and not self.is_batch:
            # Averages in a way of its own: only forwards in training move it.
            return "model.train(); [normkit.anatomy.run(model, batch) for batch in batches]; model.eval()"
        needs = ""
        if self.layer is not None and isinstance(self.layer.module, _RENORMS):
            needs += ", layerwise=True"
        if self.layer is not None and is_frozen(self.layer.module):
            needs += ", include_frozen=True"
        return f"normkit.recalibrate(model, batches{needs})"


def subjects_of_model(model: nn.Module) -> tuple[Subject, ...]:
    """Describe every normalization layer of a model that has seen its first input."""
    return tuple(_from_layer(layer) for layer in norm_layers(model) if not layer.lazy)


def subjects_of_state(state: Mapping[str, Any]) -> tuple[Subject, ...]:
    """Describe every layer whose running statistics a file of weights holds.

    Raises:
        ArgumentError: an entry that should be a tensor of one dimension is not.
    """
    ends = (".running_mean", ".running_var")
    prefixes = dict.fromkeys(key.rpartition(".")[0] for key in state if f".{key}".endswith(ends))
    return tuple(_from_state(prefix, state) for prefix in prefixes)


def _from_layer(layer: NormLayer) -> Subject:
    module = layer.module
    held = {name: _tensor(getattr(module, name, None)) for name in _FIELDS}
    return Subject(
        name=layer.path,
        kind=layer.kind,
        layer=layer,
        running_mean=held["running_mean"],
        running_var=held["running_var"],
        weight=held["weight"],
        bias=held["bias"],
        updates=_count(held["num_batches_tracked"]),
        eps=float(getattr(module, "eps", None) or 0.0),
        momentum=getattr(module, "momentum", None),
        training=bool(module.training),
        tracks=layer.tracks,
    )


def _from_state(prefix: str, state: Mapping[str, Any]) -> Subject:
    keys = {name: f"{prefix}.{name}" if prefix else name for name in _FIELDS}
    for name in _FIELDS[:4]:
        value = state.get(keys[name])
        if value is not None and (not isinstance(value, Tensor) or value.dim() != 1):
            shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ArgumentError(f"{keys[name]} is {shape}; running statistics and affine are tensors of shape (C,)")
    held = {name: _tensor(state.get(key)) for name, key in keys.items()}
    return Subject(
        name=prefix,
        kind="state",
        layer=None,
        running_mean=held["running_mean"],
        running_var=held["running_var"],
        weight=held["weight"],
        bias=held["bias"],
        updates=_count(held["num_batches_tracked"]),
        eps=1e-5,  # torch's default: a file does not say it
        eps_assumed=True,
        momentum=None,
        training=None,
        tracks=True,
    )


def _tensor(value: Any) -> Tensor | None:
    return value.detach().clone() if isinstance(value, Tensor) else None  # a probe may write the original


def _count(value: Tensor | None) -> int | None:
    return int(value) if value is not None and value.numel() == 1 else None
