"""How a normalization layer of any house is read: what it computes, and under which names it keeps its state."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..errors import ArgumentError
from ..layers import SyncBatchNorm
from ..layers.catalog import METHODS
from ..spelling import alternatives
from .tails import Tailed, tail_modules

__all__ = [
    "NAMED_STATISTICS",
    "NormForm",
    "WeightIs",
    "candidates",
    "known_form",
    "misnamed",
    "register_norm",
    "registered_form",
]

WeightIs = Literal["weight", "1 + weight", "|weight| + eps"]
Class = TypeVar("Class", bound=type[nn.Module])

# The methods that a registration may name: those that can be checked on data.
REGISTRABLE = ("batch", "sync", "instance", "group", "layer", "rms")
# The words of a registration that may name an attribute.
_ATTRIBUTES = ("weight", "bias", "mean", "var", "counter", "eps", "momentum")


@dataclass(frozen=True, kw_only=True)
class NormForm:
    """What a layer computes, and the names under which it keeps what it computes with.

    Attributes:
        method: ``"batch"``, ``"sync"``, ``"instance"``, ``"group"``, ``"layer"``, ``"rms"``, or a name of the catalog.
        weight, bias, mean, var, counter: the attributes that hold them; a layer may lack any of them.
        eps: the attribute that holds eps, or the number that the layer's code has.
        momentum: the attribute that holds momentum, the number, or None for the plain average of all batches.
        weighs_new: momentum is the weight of the new batch, as torch has it; False where it is that of the old value.
        unbiased: the stored variance is divided by m - 1; False for m.
        tail: the attributes that are called after it, in their order: a dropout, an activation.
        frozen: it normalizes with what it stores in training too.
        weight_is: what the normalized value is multiplied by.
        over: of ``"layer"`` and ``"rms"`` the dimension averaged: ``"last"`` for the last ones, ``"channels"`` for
            dimension 1, each position by itself; ``"sample"`` for all but the first.
    """

    method: str = "batch"
    weight: str = "weight"
    bias: str = "bias"
    mean: str = "running_mean"
    var: str = "running_var"
    counter: str = "num_batches_tracked"
    eps: str | float = "eps"
    momentum: str | float | None = "momentum"
    weighs_new: bool = True
    unbiased: bool = True
    tail: tuple[str, ...] = ()
    frozen: bool = False
    weight_is: WeightIs = "weight"
    over: Literal["last", "channels", "sample"] = "last"

    @property
    def of_batch(self) -> bool:
        """Whether it keeps statistics of the batch, and so is affine per channel in evaluation."""
        return self.method in ("batch", "sync")

    def tensor(self, module: nn.Module, what: Literal["weight", "bias", "mean", "var", "counter"]) -> Tensor | None:
        """Return one of the layer's own tensors, in its own shape, or None where it has none."""
        value = getattr(module, getattr(self, what), None)
        return value if isinstance(value, Tensor) else None

    def multiplier(self, module: nn.Module) -> Tensor | None:
        """Return what the normalized value is multiplied by, or None."""
        weight = self.tensor(module, "weight")
        if weight is None or self.weight_is == "weight":
            return weight
        return 1 + weight if self.weight_is == "1 + weight" else weight.abs() + self.eps_of(module)

    def eps_of(self, module: nn.Module) -> float:
        """Return eps; 0 where the layer has none."""
        value = getattr(module, self.eps, None) if isinstance(self.eps, str) else self.eps
        return float(value) if isinstance(value, int | float) else 0.0

    def momentum_of(self, module: nn.Module) -> float | None:
        """Return the weight of the **new** batch, or None for the plain average of all batches."""
        value = getattr(module, self.momentum, None) if isinstance(self.momentum, str) else self.momentum
        if not isinstance(value, int | float):
            return None
        # In nine digits, so that 0.9 becomes 0.1 and not 0.09999999999999998.
        return float(value) if self.weighs_new else round(1.0 - float(value), 9)

    def unbiased_of(self, module: nn.Module) -> bool:
        """Return whether the stored variance is divided by m - 1; ours say it in a setting."""
        return self.unbiased and bool(getattr(module, "unbiased", True))

    def tail_of(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """Return what is called after it, without what does nothing."""
        return tail_modules(module, self.tail)

    def stores(self, module: nn.Module) -> bool:
        """Say whether the layer holds a mean and a variance now."""
        return self.tensor(module, "mean") is not None and self.tensor(module, "var") is not None


# What a stored mean and variance are called by torch, Keras and its translations, and TensorFlow's checkpoints.
NAMED_STATISTICS = (
    ("running_mean", "running_var"),
    ("moving_mean", "moving_var"),
    ("moving_mean", "moving_variance"),
    ("running_mean", "running_variance"),
)
# Tutorials', and names that other things have too: tried on data before use.
_STATISTICS = (*NAMED_STATISTICS, ("moving_avg", "moving_var"), ("mean", "var"))
_AFFINES = (("weight", "bias"), ("gamma", "beta"), ("scale", "bias"), ("scale", "shift"), ("scale", "offset"))
_EPS = ("eps", "epsilon", "variance_epsilon")
_MOMENTA = ("momentum", "decay", "alpha", "rho")
# Values of eps that stand in the code of layers that have no attribute for it.
_FIXED_EPS = (1e-5, 1e-3, 1e-6, 1e-8, 1e-12, 0.0)
_TAILS = ("drop", "dropout", "act", "activation", "act_fn", "activate", "nonlinearity")

_REGISTERED: dict[type[nn.Module], NormForm] = {}
# The words of each registration that name attributes.
_TOLD: dict[type[nn.Module], dict[str, str]] = {}

# Classes known by name and not imported: what their structure alone cannot say. The names stand for the class in its
# library and for the copies that people keep of it; all are tried on data like any other.
_KNOWN: Mapping[str, NormForm] = {
    "FrozenBatchNorm2d": NormForm(frozen=True),  # torchvision, detectron2
    "FrozenBatchNormAct2d": NormForm(frozen=True, tail=("drop", "act")),  # timm
    "BatchNormAct2d": NormForm(tail=("drop", "act")),  # timm
    "SyncBatchNormAct": NormForm(method="sync", tail=("drop", "act")),  # timm
    "GroupNormAct": NormForm(method="group", tail=("drop", "act")),  # timm
    "LayerNormAct2d": NormForm(method="layer", over="channels", tail=("drop", "act")),  # timm
    "LayerNormAct": NormForm(method="layer", tail=("drop", "act")),  # timm
    "LayerNorm2d": NormForm(method="layer", over="channels"),  # timm, torchvision, SAM
    "LN2d": NormForm(method="layer", over="channels"),  # mmpretrain
    "ABN": NormForm(tail=("activation",)),  # inplace_abn
    "InPlaceABN": NormForm(tail=("activation",), weight_is="|weight| + eps"),
    "InPlaceABNSync": NormForm(method="sync", tail=("activation",), weight_is="|weight| + eps"),
    "SyncBatchNorm": NormForm(method="sync"),  # mmcv, apex
    "NaiveSyncBatchNorm": NormForm(method="sync"),  # detectron2
    "SynchronizedBatchNorm2d": NormForm(method="sync"),
    "_SynchronizedBatchNorm": NormForm(method="sync"),
}


def known_form(module: nn.Module) -> NormForm | None:
    """Return how torch's and our own classes are read, or None for a class of another house."""
    method = _method(type(module))
    return (
        None
        if method is None
        else NormForm(method=method, tail=module.tail_names if isinstance(module, Tailed) else ())
    )


def registered_form(module: nn.Module) -> NormForm | None:
    """Return the form that :func:`register_norm` was given for the class, or for the nearest class above it."""
    return next((_REGISTERED[cls] for cls in type(module).__mro__ if cls in _REGISTERED), None)


def misnamed(module: nn.Module) -> str:
    """Say which attributes a registration names that the layer has not; empty where it has all."""
    cls = next((cls for cls in type(module).__mro__ if cls in _REGISTERED), None)
    told = {} if cls is None else _TOLD[cls]
    wrong = {word: name for word, name in told.items() if not hasattr(module, name)}
    if not wrong:
        return ""
    word, name = next(iter(wrong.items()))
    state = {**module._parameters, **module._buffers, **vars(module), **module._modules}
    own = [each for each in state if each[0] != "_" and each != "training"]
    said = f"it is registered with {word}={name!r}, and {type(module).__name__} has no {name}"
    return f"{said}; {alternatives(name, own)}"


def candidates(module: nn.Module) -> Iterator[NormForm]:
    """Yield the forms that a layer of another house may have, the likeliest first; each is to be tried on data."""
    told = registered_form(module)
    if told is not None:
        yield told
        return
    named = next((_KNOWN[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _KNOWN), None)
    yield from _by_structure(module, named)


def _by_structure(module: nn.Module, named: NormForm | None) -> Iterator[NormForm]:
    held = {**module._parameters, **module._buffers}
    statistics = next((pair for pair in _STATISTICS if all(isinstance(held.get(name), Tensor) for name in pair)), None)
    of_class = _method(type(module))
    if statistics is None and named is None and of_class is None and not _may_be_per_sample(module):
        return
    method = named.method if named is not None else of_class
    if statistics is not None and statistics[0] == "mean" and method is None:
        return  # a mean and a var are no sign of a normalization: a distribution has them too
    weight, bias = next((pair for pair in _AFFINES if pair[0] in held), ("weight", "bias"))
    named_eps = next((name for name in _EPS if isinstance(getattr(module, name, None), int | float)), None)
    momentum = next((name for name in _MOMENTA if isinstance(getattr(module, name, None), int | float)), "momentum")
    shape: dict[str, Any] = {
        "weight": weight,
        "bias": bias,
        "momentum": momentum,
        "mean": statistics[0] if statistics else "running_mean",
        "var": statistics[1] if statistics else "running_var",
    }
    tails = [tuple(_tail_names(module))]
    if named is not None and named.tail and named.tail != tails[0]:
        tails.insert(0, named.tail)
    if () not in tails:
        tails.append(())
    weights: tuple[WeightIs, ...] = ("weight", "|weight| + eps", "1 + weight")
    if named is not None and named.weight_is != "weight":
        weights = (named.weight_is, "weight")
    methods = [method] if method is not None else ["batch"] if statistics else ["layer", "rms"]
    for eps in _FIXED_EPS if named_eps is None else (named_eps,):
        for tail in tails:
            for kind in weights if weight in held else weights[:1]:
                for each in methods:
                    for over in ("last", "channels", "sample") if each in ("layer", "rms") else ("last",):
                        yield NormForm(method=each, eps=eps, tail=tail, weight_is=kind, over=over, **shape)


def _may_be_per_sample(module: nn.Module) -> bool:
    """Say whether a layer of its own may be a layer or RMS normalization: by its name, and a vector that scales."""
    if "Norm" not in type(module).__name__:
        return False
    return any(isinstance(module._parameters.get(name), Tensor) for name in ("weight", "gamma", "scale"))


def _tail_names(module: nn.Module) -> Iterator[str]:
    """Name what may be called after the layer: its children, in their order, or an activation that it names."""
    yield from (name for name, child in module._modules.items() if child is not None)
    for name in _TAILS:
        value = getattr(module, name, None)
        if name not in module._modules and value is not None and (isinstance(value, str) or callable(value)):
            yield name


_TORCHS: Mapping[type[nn.Module], str] = {
    nn.SyncBatchNorm: "sync",
    SyncBatchNorm: "sync",
    _BatchNorm: "batch",
    _InstanceNorm: "instance",
    nn.GroupNorm: "group",
    nn.LayerNorm: "layer",
    nn.RMSNorm: "rms",
    nn.LocalResponseNorm: "response",
    nn.CrossMapLRN2d: "response",
}
_CLASSES: Mapping[type[nn.Module], str] = {
    **_TORCHS,
    **{cls: row.name for row in METHODS for cls in row.layers.values()},
}


def _method(cls: type[nn.Module]) -> str | None:
    """Name the method of the nearest class of torch's or ours, or None."""
    return next((_CLASSES[base] for base in cls.__mro__ if base in _CLASSES), None)


def register_norm(cls: Class, *, method: str = "batch", **names: Any) -> Class:
    """Tell normkit how to read a normalization layer of your own, so that every tool takes it as it takes torch's.

    The doctor, ``convert``, ``freeze``, ``fold``, ``recalibrate``, ``hold_statistics``, ``port_state``,
    ``param_groups`` and ``check_norm_layer`` read layers through one registry. It knows torch's and our classes, those
    of the common libraries by their names, and finds out most others by itself: names of state that are usual, tried
    on data. What neither knows is registered. A registration is tried on data too, in float64, when the first layer of
    the class is met: a layer that does not compute what was registered is left alone, and the reason says so.

    Args:
        cls: the class; subclasses are read alike. Can be used as a decorator by :func:`functools.partial`.
        method: ``"batch"``, ``"sync"``, ``"instance"``, ``"group"``, ``"layer"`` or ``"rms"``.
        **names: what differs from torch, by the attributes of :class:`NormForm`: ``weight="gamma"``,
            ``bias="beta"``, ``mean="moving_mean"``, ``var="moving_var"``, ``counter=...``, ``eps="epsilon"`` or a
            number, ``momentum="decay"`` or a number, ``weighs_new=False`` (momentum is the weight of the **old**
            value), ``unbiased=False`` (the variance stored is divided by m), ``tail=("drop", "act")``,
            ``frozen=True``, ``weight_is="1 + weight"``, ``over="channels"``.

    Returns:
        The class.

    Raises:
        ArgumentError: ``cls`` is no class of modules, or a word is none of these.

    Example:
        >>> import torch
        >>> class Scaled(nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.g, self.tiny = nn.Parameter(torch.ones(channels)), 1e-5
        ...         self.register_buffer("m", torch.zeros(channels))
        ...         self.register_buffer("v", torch.ones(channels))
        ...
        ...     def forward(self, x):
        ...         return self.g * (x - self.m) / (self.v + self.tiny).sqrt()
        >>> _ = register_norm(Scaled, weight="g", mean="m", var="v", eps="tiny", frozen=True)
        >>> from normkit.anatomy import norm_layers
        >>> [(layer.kind, layer.mean) for layer in norm_layers(Scaled(2))]
        [('frozen', tensor([0., 0.]))]
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ArgumentError(f"register_norm takes a class of torch.nn.Module, and {cls!r} is none")
    if method not in REGISTRABLE:
        raise ArgumentError(f"method is {method!r}; {alternatives(method, REGISTRABLE)}")
    allowed = NormForm.__dataclass_fields__.keys() - {"method"}
    unknown = sorted(names.keys() - allowed)
    if unknown:
        raise ArgumentError(f"register_norm has no {', '.join(unknown)}; {alternatives(unknown[0], sorted(allowed))}")
    _check_words(names)
    form = NormForm(method=method, **{**names, "tail": tuple(names.get("tail", ()))})
    _REGISTERED[cls] = form
    _TOLD[cls] = {word: name for word, name in names.items() if word in _ATTRIBUTES and isinstance(name, str)}
    _TOLD[cls] |= {f"tail[{place}]": name for place, name in enumerate(form.tail)}
    return cls


def _check_words(names: Mapping[str, Any]) -> None:
    """Refuse a word of a registration that has the wrong form."""
    for name in ("weight", "bias", "mean", "var", "counter"):
        if name in names and not isinstance(names[name], str):
            raise ArgumentError(f"{name}={names[name]!r}: the name of an attribute is needed")
    for name in ("eps", "momentum"):
        if not isinstance(names.get(name, ""), str | int | float | None):
            raise ArgumentError(f"{name}={names[name]!r}: the name of an attribute or a number is needed")
    for name in ("weighs_new", "unbiased", "frozen"):
        if not isinstance(names.get(name, True), bool):
            raise ArgumentError(f"{name}={names[name]!r}: True or False is needed")
    tail = names.get("tail", ())
    if isinstance(tail, str) or not all(isinstance(name, str) for name in tail):
        raise ArgumentError(f"tail={tail!r}: names of attributes are needed, as in tail=('drop', 'act')")
    for name, known in (("weight_is", WeightIs.__args__), ("over", ("last", "channels", "sample"))):  # type: ignore[attr-defined]
        if names.get(name, known[0]) not in known:
            raise ArgumentError(f"{name}={names[name]!r}; {alternatives(names[name], known)}")
