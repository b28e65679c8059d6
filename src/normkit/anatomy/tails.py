"""What a normalization layer brings along behind it: a dropout, an activation; and our layers with such a tail."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..kernels.dispatch import Activation
from ..layers import SyncBatchNorm
from ..layers.batch import _BatchNorm
from ..layers.catalog import METHODS

__all__ = ["TAILED", "Called", "Tailed", "fused_activation", "tail_modules"]


class Called(nn.Module):
    """A function as a module.

    >>> import torch
    >>> Called(torch.relu)(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        """Call it."""
        return self.function(input)


def tail_modules(module: nn.Module, names: tuple[str, ...]) -> tuple[nn.Module, ...]:
    """Return what the named attributes stand for, in their order, without what does nothing.

    An attribute is a module, a function, or the name of one, as inplace_abn has it: ``activation="leaky_relu"`` with
    ``activation_param``.
    """
    return tuple(_found(module, names))


def _found(module: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, str):
            value = _by_name(value, getattr(module, "activation_param", None))
        if value is None or isinstance(value, nn.Identity):
            continue
        yield value if isinstance(value, nn.Module) else Called(value)


def _by_name(name: str, parameter: Any) -> nn.Module | Callable[[Tensor], Tensor] | None:
    """Return the activation of a name, or None for ``"identity"`` and the like."""
    if name in ("", "identity", "none", "linear"):
        return None
    slope = float(parameter) if isinstance(parameter, int | float) else None
    if name == "leaky_relu":
        return nn.LeakyReLU(0.01 if slope is None else slope)
    if name == "elu":
        return nn.ELU(1.0 if slope is None else slope)
    made: type[nn.Module] | None = {
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "silu": nn.SiLU,
        "swish": nn.SiLU,
        "gelu": nn.GELU,
    }.get(name)
    if made is not None:
        return made()
    found: Callable[[Tensor], Tensor] | None = getattr(functional, name, None)
    return found


_FUSED: Mapping[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}
_SLOPE = 0.01  # of the leaky ReLU that the kernels know


def fused_activation(module: nn.Module) -> Activation | None:
    """Name the activation that a module is, if the fused kernels know it and no hook sees it.

    >>> fused_activation(nn.ReLU(inplace=True)), fused_activation(nn.LeakyReLU(0.2)), fused_activation(nn.GELU())
    ('relu', None, None)
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if type(module) is nn.LeakyReLU and module.negative_slope == _SLOPE:
        return "leaky_relu"
    return _FUSED.get(type(module))


class Tailed(nn.Module):
    """Mixed into a norm's class: what stands in the attributes ``tail_names`` is called after it, in this order.

    ``normkit.convert`` makes these of the layers that other libraries have: the children keep their names, so that the
    state keeps its own, and ``isinstance`` says of the layer what it said before. Batch norms of ours compute an
    activation that the kernels know in the same pass.

    Attributes:
        tail_names: the attributes, modules or functions.
        source_class: the class that the object had before the conversion, where only its class was changed.
    """

    tail_names: tuple[str, ...] = ()
    source_class: type[nn.Module] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, then call the tail; shapes are the norm's own."""
        tail = [getattr(self, name) for name in self.tail_names]
        tail = [step for step in tail if type(step) is not nn.Identity]
        if len(tail) == 1 and isinstance(self, _BatchNorm) and isinstance(tail[0], nn.Module):
            activation = fused_activation(tail[0])
            if activation is not None:
                return self.normalize(input, activation, None, False)
        output: Tensor = super().forward(input)
        for step in tail:
            output = step(output)
        return output


def _tailed() -> dict[type[nn.Module], type[Tailed]]:
    """Build the class with a tail of every class that a conversion can end in, under names that pickle finds."""
    torchs: list[type[nn.Module]] = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm]
    torchs += [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d]
    ours = [cls for row in METHODS if row.name in ("batch", "renorm", "ghost") for cls in row.layers.values()]
    ours.append(SyncBatchNorm)
    made: dict[type[nn.Module], type[Tailed]] = {}
    for prefix, classes in (("TorchTailed", torchs), ("Tailed", ours)):
        for cls in dict.fromkeys(classes):
            name = f"{prefix}{cls.__name__}"
            about = f"``{cls.__module__.split('.')[0]}``'s ``{cls.__name__}``, and what is called after it."
            made[cls] = type(name, (Tailed, cls), {"__module__": __name__, "__doc__": about})
            globals()[name] = made[cls]
    return made


TAILED: Mapping[type[nn.Module], type[Tailed]] = _tailed()
