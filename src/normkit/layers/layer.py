"""Layer normalization as a module: torch's class, with our function below it."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import ArgumentError
from ..functional import checks, ordinary
from .group import GroupNorm
from .tracing import TracedAsTorch, torch_forward

__all__ = ["LayerNorm", "SampleLayerNorm", "resolve_normalized_shape"]


class LayerNorm(TracedAsTorch, nn.LayerNorm):
    """Layer normalization of ``(*, *normalized_shape)``: every position of the leading dimensions by itself.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, mean and var over the last dimensions. The formula and every
    convention stand at :func:`normkit.functional.layer_norm`. ``state_dict`` is torch's, in both directions.

    Args:
        normalized_shape: the sizes of the last dimensions, or the size of the last one; all at least 1.
        eps: added to the variance; its unit is that of the input squared. Not negative.
        elementwise_affine: learn weight and bias, which start at 1 and 0.
        bias: False for a layer that learns only a weight.
        device: where the state lives.
        dtype: the type of the state.

    Raises:
        ArgumentError: normalized_shape or eps out of range.

    Example:
        >>> LayerNorm(2)(torch.tensor([[1.0, 3.0], [10.0, 30.0]])).detach().round()
        tensor([[-1.,  1.],
                [-1.,  1.]])

    References:
        Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450, equation (3).
    """

    _torch_layer, _torch_forward = nn.LayerNorm, torch_forward(nn.LayerNorm)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_eps(eps)
        super().__init__(resolve_normalized_shape(normalized_shape), eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; see :func:`normkit.functional.layer_norm` for formula and conventions."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._torch_forward(input)
        else:  # TorchScript compiles what follows a return
            weight, bias = self._weight_and_bias()
            served = ordinary.trailing_norm(input, self.normalized_shape, weight, bias, self.eps, True)
            if served is not None:
                return served
            node = self._as_node(input)
            if node is not None:
                return node
            caller = self._caller(input)
            return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps, caller=caller)


class SampleLayerNorm(GroupNorm):
    """Layer normalization of a whole sample ``(N, C, *)``: over all its channels and positions.

    Weight and bias have one value per channel, so the number of positions need not be known: this is
    :class:`GroupNorm` with one group, as in Wu and He's comparison, and its ``state_dict`` is that one's.

    Args:
        num_channels: C, at least 1.
        eps: added to the variance; its unit is that of the input squared. Not negative.
        affine: learn weight and bias, which start at 1 and 0.
        device: where the state lives.
        dtype: the type of the state.
        bias: False for a layer that learns only a weight.

    Raises:
        ArgumentError: num_channels or eps out of range.

    Example:
        >>> SampleLayerNorm(2)(torch.tensor([[[1.0, 1.0], [3.0, 3.0]]])).detach().round().flatten()
        tensor([-1., -1.,  1.,  1.])
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(1, num_channels, eps, affine, device, dtype, bias=bias)


def resolve_normalized_shape(normalized_shape: int | Sequence[int]) -> list[int]:
    """Return the sizes as a list.

    Raises:
        ArgumentError: no size, or one that is no integer or below 1.
    """
    given = normalized_shape
    sizes = list(given) if isinstance(given, Sequence) else [given]
    try:
        found = [operator.index(size) for size in sizes]
    except TypeError:
        raise ArgumentError(f"normalized_shape must hold integers, got {given!r}; pass input.shape[-1:]") from None
    if not found or min(found) < 1 or any(isinstance(size, bool) for size in sizes):
        raise ArgumentError(f"normalized_shape must hold sizes of at least 1, got {given!r}; pass input.shape[-1:]")
    return found
