"""The normalization layers of a model: where they are, of which kind, and what stands in the way of changing them."""

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..layers.catalog import METHODS
from .frozen import Frozen
from .select import Where, select

__all__ = ["NormLayer", "norm_layers"]

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

_TORCH_KINDS: dict[type[nn.Module], str] = {
    nn.SyncBatchNorm: "sync",
    _BatchNorm: "batch",
    _InstanceNorm: "instance",
    nn.GroupNorm: "group",
    nn.LayerNorm: "layer",
    nn.RMSNorm: "rms",
    nn.LocalResponseNorm: "response",
    nn.CrossMapLRN2d: "response",
}


@dataclass(frozen=True, kw_only=True)
class NormLayer:
    """One normalization layer of a model.

    Attributes:
        path: the first name under which ``model.named_modules()`` finds it; ``""`` is the model itself.
        aliases: its other names, where one module stands in several places.
        module: the layer.
        kind: ``"batch"``, ``"sync"``, ``"instance"``, ``"group"``, ``"layer"``, ``"rms"``, ``"response"``, a name of
            the catalog, ``"frozen"`` (its statistics or affine are held still), or ``"unknown"`` for a module that
            keeps ``running_mean`` and ``running_var`` but is none of these.
        channels: the number of channels, where the layer says it.
        tracks: it has running statistics and is set to use them.
        overridden: its forward is neither torch's nor ours, so nothing is known of what it computes.
        hooked: it has hooks.
        parametrized: a parameter is computed from another (weight norm, spectral norm, ...).
        lazy: it has not seen its first input yet, so that its parameters have no shape.
    """

    path: str
    aliases: tuple[str, ...]
    module: nn.Module
    kind: str
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
        ArgumentError: a pattern, class or module matches no layer, or ``where`` is none of the above.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    >>> [(layer.path, layer.kind, layer.tracks) for layer in norm_layers(model)]
    [('1', 'batch', True), ('2', 'group', False)]
    >>> [layer.path for layer in norm_layers(model, where=nn.GroupNorm)]
    ['2']
    """
    names: dict[int, list[str]] = {}
    found: dict[int, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = _kind(module)
        if kind is None:
            continue
        names.setdefault(id(module), []).append(path)
        found[id(module)] = (module, kind)
    layers = [_describe(module, kind, names[key]) for key, (module, kind) in found.items()]
    return select(layers, where)


def _kind(module: nn.Module) -> str | None:
    """Name the kind of a layer by its nearest known class, or return None for what is no normalization."""
    if isinstance(module, Frozen):
        return "frozen"
    known = _TORCH_KINDS | {cls: row.name for row in METHODS for cls in row.layers.values()}
    for cls in type(module).__mro__:
        if cls in known:
            return known[cls]
    if {"running_mean", "running_var"} <= module._buffers.keys():
        fixed = {"weight", "bias"} <= module._buffers.keys()
        return "frozen" if fixed else "unknown"
    return None


def _describe(module: nn.Module, kind: str, names: list[str]) -> NormLayer:
    """Fill in what there is to know of one layer."""
    lazy = isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
    state = (*module._parameters.values(), *module._buffers.values())
    return NormLayer(
        path=names[0],
        aliases=tuple(names[1:]),
        module=module,
        kind=kind,
        channels=_channels(module, lazy),
        tracks=_tracks(module),
        overridden=_is_overridden(module),
        hooked=any(getattr(module, name, None) for name in _HOOKS),
        parametrized=is_parametrized(module) or _has_old_weight_norm(module),
        lazy=lazy or any(tensor is not None and is_lazy(tensor) for tensor in state),
    )


def _channels(module: nn.Module, lazy: bool) -> int | None:
    """Read the number of channels off the layer's settings or statistics."""
    for name in ("num_features", "num_channels"):
        value = getattr(module, name, None)
        if isinstance(value, int) and not lazy:
            return value
    statistics = module._buffers.get("running_mean")
    return statistics.numel() if statistics is not None and not lazy else None


def _tracks(module: nn.Module) -> bool:
    """Say whether the layer has running statistics; a layer without the flag uses what it has."""
    flag = vars(module).get("track_running_stats", True)
    return bool(flag) and module._buffers.get("running_mean") is not None


def _is_overridden(module: nn.Module) -> bool:
    """Say whether a class of another house defines what a call of this layer does."""
    if "forward" in vars(module):
        return True
    return not all(_is_known(_definer(type(module), name)) for name in ("forward", "__call__"))


def _definer(cls: type, name: str) -> type:
    """Return the class that defines a method."""
    return next(base for base in cls.__mro__ if name in vars(base))


def _is_known(cls: type) -> bool:
    """Say whether a class is torch's or ours."""
    return cls.__module__.startswith("torch.nn.modules.") or cls.__module__.split(".")[0] == "normkit"


def _has_old_weight_norm(module: nn.Module) -> bool:
    """Recognise torch.nn.utils.weight_norm and spectral_norm of before the parametrizations: they leave a hook."""
    return any(type(hook).__module__.startswith("torch.nn.utils.") for hook in module._forward_pre_hooks.values())
