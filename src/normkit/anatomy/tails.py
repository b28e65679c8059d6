"""What a normalization layer brings along behind it: a dropout, an activation."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Called", "tail_modules"]


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
    made = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "swish": nn.SiLU, "gelu": nn.GELU}.get(name)
    if made is not None:
        return made()
    function: Callable[[Tensor], Tensor] | None = getattr(functional, name, None)
    return function
