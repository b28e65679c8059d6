"""Weight normalization and weight standardization: parametrizations of another layer's weight."""

import functools
import sys
from types import FrameType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import functional
from ..errors import ArgumentError
from ..functional import checks
from ..functional.weight import slice_axes
from .tracing import Unscriptable

__all__ = ["WeightNorm", "WeightStandardization"]

Layer = TypeVar("Layer", bound=nn.Module)


class WeightNorm(Unscriptable):
    """A weight as length times direction: ``w = g * v / |v|``, one length per output.

    The formula and every convention stand at :func:`normkit.functional.weight_norm`. Registered on a layer it learns g
    (``parametrizations.weight.original0``) and v (``original1``): the names and values of
    ``torch.nn.utils.parametrizations.weight_norm``, so that checkpoints load in both directions. A layer also loads the
    older names ``weight_g`` and ``weight_v`` of ``torch.nn.utils.weight_norm``, however this was registered on it.

    Args:
        dim: the dimension of the outputs; None for a single length. -1 is the last dimension, where torch's own weight
            normalization takes it for None.

    Example:
        >>> import torch
        >>> layer = WeightNorm.register(nn.Linear(3, 2))
        >>> sorted(name for name, _ in layer.named_parameters())
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']

    References:
        Salimans and Kingma, Weight Normalization, 2016, arXiv:1602.07868, equation (2).
    """

    def __init__(self, dim: int | None = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, magnitude: Tensor, v: Tensor) -> Tensor:
        """Return the weight; see :func:`normkit.functional.weight_norm`."""
        return functional.weight_norm(v, magnitude, self.dim)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Split a weight into its lengths and itself.

        Raises:
            ArgumentError: a slice of the weight is zero and has no direction.
        """
        norm = weight.detach().double().square().sum(slice_axes(weight, self.dim), keepdim=True).sqrt()
        if not weight.is_meta and not bool((norm > 0).all()):
            raise ArgumentError("a slice of the weight is zero and has no direction; initialise it first")
        _load_older_names(*_being_parametrized())
        magnitude = norm.to(weight.dtype)
        return (magnitude if self.dim is not None else magnitude.reshape(())), weight

    @classmethod
    def register(cls, module: Layer, name: str = "weight", dim: int | None = 0) -> Layer:
        """Parametrize a layer's weight, and return the layer. What it computes stays the same.

        Raises:
            ArgumentError: the layer has no such tensor, or a slice of it is zero.
        """
        _check_tensor(module, name)
        parametrize.register_parametrization(module, name, cls(dim), unsafe=True)
        return module


class WeightStandardization(Unscriptable):
    """Weights of zero mean and unit variance for every output: ``w = (v - mean) / sqrt(var + eps)``.

    The formula and every convention stand at :func:`normkit.functional.weight_standardization`. Registered on a layer
    it learns v (``parametrizations.weight.original``). What the layer computes changes.

    Args:
        eps: added to the variance; its unit is that of the weight squared. Not negative.

    Raises:
        ArgumentError: eps out of range.

    Example:
        >>> import torch
        >>> layer = WeightStandardization.register(nn.Conv2d(3, 2, 5))
        >>> layer.weight.mean((1, 2, 3)).abs().max().item() < 1e-6
        True

    References:
        Qiao, Wang, Liu, Shen and Yuille, Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, 2019, arXiv:1903.10520, equations (2) to (4).
    """

    def __init__(self, eps: float = 1e-6) -> None:
        checks.check_eps(eps)
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        """Return the standardized weight; see :func:`normkit.functional.weight_standardization`."""
        return functional.weight_standardization(weight, self.eps)

    @classmethod
    def register(cls, module: Layer, name: str = "weight", eps: float = 1e-6) -> Layer:
        """Parametrize a layer's weight, and return the layer.

        Raises:
            ArgumentError: the layer has no such tensor.
        """
        _check_tensor(module, name)
        parametrize.register_parametrization(module, name, cls(eps), unsafe=True)
        return module


def _being_parametrized() -> tuple[nn.Module | None, str]:
    """Return the layer and the name that torch's register_parametrization is at work on, and None outside it.

    The older names stand in the layer's own part of a state dict, which only a hook on the layer sees; torch shows a
    parametrization its tensors and never the layer. So the call is read from the stack, by the names of its arguments.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not parametrize.register_parametrization.__code__:
        frame = frame.f_back
    return (None, "") if frame is None else (frame.f_locals["module"], frame.f_locals["tensor_name"])


def _load_older_names(module: nn.Module | None, name: str) -> None:
    """Let a layer take ``weight_g`` and ``weight_v`` for the two tensors of its parametrized weight."""
    if module is not None:
        module.register_load_state_dict_pre_hook(functools.partial(_rename, name=name))


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any, name: str) -> None:
    """Give length and direction the names they have here; a state that lacks one of them is left to torch's errors."""
    older = (f"{prefix}{name}_g", f"{prefix}{name}_v")
    if not parametrize.is_parametrized(module, name) or not all(key in state for key in older):
        return
    held: Any = module.parametrizations[name]  # type: ignore[index]
    if not isinstance(held[0], WeightNorm):
        return
    names = [f"{prefix}parametrizations.{name}.original{index}" for index in range(2)]
    if any(key in state for key in names):
        return
    length, expected = state[older[0]], held.original0
    if isinstance(length, Tensor) and length.dim() == 0 < expected.dim():
        errors: list[str] = rest[-1]
        errors.append(
            f"{older[0]} is a single length, and WeightNorm(dim={held[0].dim}) learns {tuple(expected.shape)}; "
            "torch takes dim=-1 for None: register WeightNorm(dim=None)"
        )
    for old, new in zip(older, names, strict=True):
        state[new] = state.pop(old)


def _check_tensor(module: nn.Module, name: str) -> None:
    if not isinstance(getattr(module, name, None), Tensor):
        known = ", ".join(key for key, _ in module.named_parameters(recurse=False)) or "none"
        raise ArgumentError(f"{type(module).__name__} has no tensor {name!r}; its parameters are: {known}")
