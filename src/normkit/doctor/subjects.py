"""What the checks look at: one normalization layer, from a model or from a file of weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..anatomy import NormLayer, norm_layers, refuse_meta
from ..anatomy.forms import NormForm
from ..anatomy.frozen import is_frozen, moved
from ..errors import ArgumentError
from ..layers import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
)
from ..layers.laws import law_of

__all__ = ["Subject", "lazy_layers", "subjects_of_model", "subjects_of_state"]

_RENORMS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)
_RELATIVES = (*_RENORMS, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)
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
        average: ``"moving"``, or ``"debiased"`` where nothing is left of the initial values.
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
    average: str = "moving"

    @property
    def is_batch(self) -> bool:
        """Whether the layer takes its statistics over the batch, as far as is known."""
        if self.kind == "frozen":
            return self.tracks and (self.names.of_batch or isinstance(self._module, _RELATIVES))
        return self.kind in {"batch", "sync", "ghost", "renorm", "masked", "state"}

    @property
    def moves(self) -> bool:
        """Whether a forward now would write the running statistics."""
        if self.layer is None or not self.tracks or self.is_fixed:
            return False
        module = self.layer.module
        if self.is_switched_off:
            return False
        wished = bool(vars(module).get("training", module.training))
        return wished and (not is_frozen(module) or bool(getattr(module, "frozen_track", True)))

    @property
    def is_switched_off(self) -> bool:
        """Whether ``track_running_stats`` was put to False on a layer that evaluates with what it stores."""
        module = self._module
        heedless = isinstance(module, _RELATIVES) or not isinstance(module, _BatchNorm)
        return module is not None and self.tracks and not heedless and not vars(module).get("track_running_stats", True)

    @property
    def thawed(self) -> tuple[str, ...]:
        """What :func:`normkit.freeze` holds still and something has written to all the same."""
        return () if self.layer is None else moved(self.layer.module)

    @property
    def _module(self) -> nn.Module | None:
        return None if self.layer is None else self.layer.module

    @property
    def affine(self) -> list[nn.Parameter]:
        """The layer's own parameters."""
        return [] if self.layer is None else list(self.layer.module.parameters(recurse=False))

    @property
    def held_still(self) -> bool:
        """Whether the layer has an affine part and none of it learns."""
        return bool(self.affine) and not any(parameter.requires_grad for parameter in self.affine)

    @property
    def names(self) -> NormForm:
        """The names of weight, bias and statistics, as the registry reads the layer."""
        return (self.layer.form if self.layer is not None else None) or NormForm()

    @property
    def is_fixed(self) -> bool:
        """Whether the layer normalizes with what it stores in training too, because of its class."""
        return self.names.frozen

    @property
    def accessor(self) -> str:
        """Python that reaches the layer from ``model``; the name is written in where findings are joined."""
        return "model.get_submodule({layer})"

    @property
    def forwards(self) -> str:
        """Python that moves the statistics of a layer whose input nothing but its own code can measure."""
        return "model.train(); [normkit.anatomy.run(model, batch) for batch in batches]; model.eval()"

    @property
    def recalibration(self) -> str:
        """Python that gives the layer the statistics of the data, with what this kind of layer needs beside them."""
        if self.kind in ("unknown", "whitening") or (self.layer is not None and self.layer.form is None):
            return self.forwards  # it averages in a way of its own
        needs = ""
        if self.layer is not None and isinstance(self.layer.module, _RENORMS):
            needs += ", layerwise=True"
        if self.layer is not None and is_frozen(self.layer.module):
            needs += ", include_frozen=True"
        return f"normkit.recalibrate(model, batches{needs})"


def subjects_of_model(model: nn.Module) -> tuple[Subject, ...]:
    """Describe every normalization layer of a model that has seen its first input."""
    refuse_meta(model)
    return tuple(_from_layer(layer) for layer in _layers(model) if not layer.lazy)


def lazy_layers(model: nn.Module) -> list[str]:
    """Name the layers that have not seen their first input yet."""
    return [layer.path for layer in _layers(model) if layer.lazy]


def _layers(model: nn.Module) -> list[NormLayer]:
    try:
        return norm_layers(model)
    except ArgumentError:
        # The module of an exported program has operators for layers; what can be asked is how it was captured.
        if isinstance(model, fx.GraphModule):
            return []
        raise


def subjects_of_state(state: Mapping[str, Any]) -> tuple[Subject, ...]:
    """Describe every layer whose running statistics a file of weights holds.

    Raises:
        ArgumentError: an entry that should be a tensor of one dimension is not.
    """
    ends = (".running_mean", ".running_var")
    prefixes = dict.fromkeys(key.rpartition(".")[0] for key in state if f".{key}".endswith(ends))
    return tuple(_from_state(prefix, state) for prefix in prefixes)


def _from_layer(layer: NormLayer) -> Subject:
    module, form = layer.module, layer.form or NormForm()
    held = {what: _vector(form.tensor(module, what)) for what in ("mean", "var", "weight", "bias")}
    # What torch's own layers were given as momentum is judged as it stands, be it a number or not.
    given = layer.momentum if layer.form is not None and layer.overridden else getattr(module, "momentum", None)
    return Subject(
        name=layer.path,
        kind=layer.kind,
        layer=layer,
        running_mean=held["mean"],
        running_var=held["var"],
        weight=_multiplier(held["weight"], form, form.eps_of(module)),
        bias=held["bias"],
        updates=_count(_tensor(form.tensor(module, "counter"))),
        eps=form.eps_of(module),
        momentum=given,
        training=bool(module.training),
        tracks=layer.tracks,
        average=law_of(module)[0],
    )


def _vector(value: Tensor | None) -> Tensor | None:
    """Return a layer's tensor of any shape as one value per channel."""
    if value is None or is_lazy(value):
        return None
    return value.detach().clone().reshape(-1) if value.dim() != 1 else value.detach().clone()


def _multiplier(weight: Tensor | None, form: NormForm, eps: float) -> Tensor | None:
    """Return what the normalized value is multiplied by."""
    if weight is None or form.weight_is == "weight":
        return weight
    return 1 + weight if form.weight_is == "1 + weight" else weight.abs() + eps


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
    """Return a counter as a number; a negative one counts nothing."""
    return int(value) if value is not None and value.numel() == 1 and value >= 0 else None
