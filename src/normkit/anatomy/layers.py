"""The normalization layers of a model: where they are, of which kind, and what stands in the way of changing them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..layers import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .evidence import Evidence, examined
from .forms import NAMED_STATISTICS, NormForm, known_form, registered_form
from .frozen import Frozen
from .places import places_of
from .programs import refuse_programs
from .select import Where, select
from .tails import Tailed

__all__ = ["NormLayer", "norm_layers"]

_HOLDERS = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True, kw_only=True)
class NormLayer:
    """One normalization layer of a model.

    Attributes:
        path: the first name under which ``model.named_modules()`` finds it; ``""`` is the model itself.
        aliases: its other names, where one module stands in several places.
        module: the layer.
        kind: ``"batch"``, ``"sync"``, ``"instance"``, ``"group"``, ``"layer"``, ``"rms"``, ``"response"``, a name of
            the catalog, ``"frozen"`` (its statistics or affine are held still), or ``"unknown"`` for a module that
            keeps running statistics, or is registered, but is none of these as far as the data show.
        form: how it is read: the names of its state, its settings, its tail. Of torch's and our classes it is known;
            of a class of another house it is what the data confirm (:mod:`normkit.anatomy.evidence`), and None where
            they confirm nothing: then nothing may be claimed of what it computes.
        unread: why ``form`` is None, in words; empty where it is not.
        channels: the number of channels, where the layer says it.
        tracks: it has running statistics and evaluates with them.
        overridden: its forward is neither torch's nor ours; what it computes is known as far as ``form`` says.
        hooked: it has hooks.
        parametrized: a parameter is computed from another (weight norm, spectral norm, ...).
        lazy: it has not seen its first input yet, so that its parameters have no shape.
    """

    path: str
    aliases: tuple[str, ...]
    module: nn.Module
    kind: str
    form: NormForm | None
    unread: str
    channels: int | None
    tracks: bool
    overridden: bool
    hooked: bool
    parametrized: bool
    lazy: bool

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the layer: its path and its aliases."""
        return (self.path, *self.aliases)

    @property
    def weight(self) -> Tensor | None:
        """The layer's weight, in its own shape and under whatever name it has."""
        return None if self.form is None else self.form.tensor(self.module, "weight")

    @property
    def effective_weight(self) -> Tensor | None:
        """What the normalized value is multiplied by, computed where the layer computes it: ``1 + weight``, ..."""
        return None if self.form is None else self.form.multiplier(self.module)

    @property
    def bias(self) -> Tensor | None:
        """What is added then, likewise."""
        return None if self.form is None else self.form.tensor(self.module, "bias")

    @property
    def mean(self) -> Tensor | None:
        """The stored mean, likewise: the tensor that the layer holds now, since some layers replace it."""
        return None if self.form is None else self.form.tensor(self.module, "mean")

    @property
    def var(self) -> Tensor | None:
        """The stored variance, likewise."""
        return None if self.form is None else self.form.tensor(self.module, "var")

    @property
    def counter(self) -> Tensor | None:
        """The number of batches seen, likewise."""
        return None if self.form is None else self.form.tensor(self.module, "counter")

    @property
    def eps(self) -> float:
        """The layer's eps; 0 where it has none."""
        return 0.0 if self.form is None else self.form.eps_of(self.module)

    @property
    def momentum(self) -> float | None:
        """The weight of the new batch, whichever way the layer has it; None for the plain average."""
        return None if self.form is None else self.form.momentum_of(self.module)

    @property
    def unbiased(self) -> bool:
        """Whether the stored variance is divided by m - 1."""
        return self.form is None or self.form.unbiased_of(self.module)

    @property
    def tail(self) -> tuple[nn.Module, ...]:
        """What the layer calls after it normalized: a dropout, an activation."""
        return () if self.form is None else self.form.tail_of(self.module)

    def __str__(self) -> str:
        """Return the path and the class, as messages name a layer."""
        return f"{self.path or '(the model itself)'} ({type(self.module).__name__})"


def norm_layers(model: nn.Module, where: Where = None) -> list[NormLayer]:
    """List the normalization layers of a model, each module once, in the order of ``named_modules``.

    Args:
        model: any module.
        where: which of them. None takes all; a string is a pattern of the path as of a file's (``"backbone.*"``;
            the name of a container takes all below it); a class takes its instances; a module takes all layers
            below it; a function is asked with the :class:`NormLayer`; a list, tuple or set takes what any of its
            entries takes.

    Raises:
        ArgumentError: a pattern, class or module matches no layer, or ``where`` is none of the above; or the model is a
            program (a ScriptModule, an exported program) or no module at all.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    >>> [(layer.path, layer.kind, layer.tracks) for layer in norm_layers(model)]
    [('1', 'batch', True), ('2', 'group', False)]
    >>> [layer.path for layer in norm_layers(model, where=nn.GroupNorm)]
    ['2']
    """
    refuse_programs(model)
    names: dict[int, list[str]] = {}
    found: dict[int, tuple[nn.Module, str, Evidence]] = {}
    for path, module in places_of(model):
        if isinstance(module, torch.jit.ScriptModule):
            continue  # without a norm in it, or refused above
        if isinstance(module, _HOLDERS):
            continue  # what normalizes is the part they hold
        if id(module) not in names:
            read = _read(module)
            if read is None:
                continue
            found[id(module)] = (module, *read)
        names.setdefault(id(module), []).append(path)
    layers = [_describe(module, kind, evidence, names[key]) for key, (module, kind, evidence) in found.items()]
    return select(layers, where)


def _read(module: nn.Module) -> tuple[str, Evidence] | None:
    """Name the kind of a layer and how it is read, or return None for what is no normalization."""
    known = known_form(module)
    of_torch = known is not None and not _is_overridden(module)
    tailed = isinstance(module, Tailed) and "forward" not in vars(module)
    evidence = Evidence(known) if of_torch or tailed else examined(module)
    if isinstance(module, Frozen) or (evidence.form is not None and evidence.form.frozen):
        return "frozen", evidence
    if evidence.form is not None:
        return evidence.form.method, evidence
    if known is not None:
        return known.method, evidence
    if registered_form(module) is not None:
        return "unknown", evidence  # told to be one, and the data say otherwise: that is not to be passed over
    held = module._buffers.keys()
    return ("unknown", evidence) if any(held >= set(pair) for pair in NAMED_STATISTICS) else None


def _describe(module: nn.Module, kind: str, evidence: Evidence, names: list[str]) -> NormLayer:
    """Fill in what there is to know of one layer."""
    lazy = isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
    state = (*module._parameters.values(), *module._buffers.values())
    return NormLayer(
        path=names[0],
        aliases=tuple(names[1:]),
        module=module,
        kind=kind,
        form=evidence.form,
        unread="" if evidence.form is not None else evidence.reason or "its forward is neither torch's nor ours",
        channels=_channels(module, evidence.form, lazy),
        tracks=_tracks(module, evidence.form),
        overridden=_is_overridden(module),
        hooked=any(getattr(module, name, None) for name in _HOOKS),
        parametrized=is_parametrized(module) or _has_old_weight_norm(module),
        lazy=lazy or any(tensor is not None and is_lazy(tensor) for tensor in state),
    )


def _channels(module: nn.Module, form: NormForm | None, lazy: bool) -> int | None:
    """Read the number of channels off the layer's settings or statistics."""
    for name in ("num_features", "num_channels"):
        value = getattr(module, name, None)
        if isinstance(value, int) and not lazy:
            return value
    statistics = (form or NormForm()).tensor(module, "mean")
    return statistics.numel() if statistics is not None and not lazy else None


def _tracks(module: nn.Module, form: NormForm | None) -> bool:
    """Say whether the layer has running statistics and evaluates with them.

    A batch norm uses what it has: ``track_running_stats = False`` put on a layer that was built with statistics only
    stops training from moving them. An instance norm heeds the flag.
    """
    heeds = isinstance(module, _InstanceNorm) or (form is not None and form.method == "instance")
    flag = vars(module).get("track_running_stats", True) if heeds else True
    return bool(flag) and (form or NormForm()).tensor(module, "mean") is not None


def _is_overridden(module: nn.Module) -> bool:
    """Say whether a class of another house defines what a call of this layer does, or a tail comes after it."""
    if "forward" in vars(module) or isinstance(module, Tailed):
        return True
    cls = type(module).__mro__[2] if isinstance(module, Frozen) else type(module)
    return not all(_is_known(_definer(cls, name)) for name in ("forward", "__call__"))


def _definer(cls: type, name: str) -> type:
    """Return the class that defines a method."""
    return next(base for base in cls.__mro__ if name in vars(base))


def _is_known(cls: type) -> bool:
    """Say whether a class is torch's or ours."""
    return cls.__module__.startswith("torch.nn.modules.") or cls.__module__.split(".")[0] == "normkit"


def _has_old_weight_norm(module: nn.Module) -> bool:
    """Recognise torch.nn.utils.weight_norm and spectral_norm of before the parametrizations: they leave a hook."""
    return any(type(hook).__module__.startswith("torch.nn.utils.") for hook in module._forward_pre_hooks.values())
