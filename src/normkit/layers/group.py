"""Group normalization as a module: torch's class, with our function below it."""

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import ArgumentError
from ..functional import checks, ordinary, shapes
from .tracing import TracedAsTorch, torch_forward

__all__ = ["GroupNorm"]


class GroupNorm(TracedAsTorch, nn.GroupNorm):
    """Group normalization of ``(N, C, *)``: groups of neighbouring channels, every sample by itself.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, mean and var over the channels of a group and all positions.
    The formula and every convention stand at :func:`normkit.functional.group_norm`. ``state_dict`` is torch's, in both
    directions.

    Args:
        num_groups: a divisor of num_channels. 1 is layer normalization, num_channels instance normalization.
        num_channels: C, at least 1.
        eps: added to the variance; its unit is that of the input squared. Not negative.
        affine: learn weight and bias, which start at 1 and 0.
        device: where the state lives.
        dtype: the type of the state.
        bias: False for a layer that learns only a weight.

    Raises:
        ArgumentError: num_groups does not divide num_channels (the divisors are listed), or eps out of range.

    Example:
        >>> GroupNorm(2, 4)(torch.tensor([[1.0, 3.0, 10.0, 30.0]])).detach().round()
        tensor([[-1.,  1., -1.,  1.]])

    References:
        Wu and He, Group Normalization, 2018, arXiv:1803.08494, equations (1), (2) and (7).
    """

    _torch_layer, _torch_forward = nn.GroupNorm, torch_forward(nn.GroupNorm)

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        if isinstance(num_channels, bool) or not isinstance(num_channels, int) or num_channels < 1:
            raise ArgumentError(f"num_channels must be an integer of at least 1, got {num_channels!r}")
        shapes.check_divides(num_groups, num_channels)
        checks.check_eps(eps)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if affine and not bias:
            # torch before 2.13 has no bias= of its own.
            self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; see :func:`normkit.functional.group_norm` for formula and conventions."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._torch_forward(input)
        else:  # TorchScript compiles what follows a return
            weight, bias = self._weight_and_bias()
            # Only a weight says how many channels an input must have.
            if weight is not None:
                served = ordinary.group_norm(input, self.num_groups, weight, bias, self.eps)
                if served is not None:
                    return served
            node = self._as_node(input)
            if node is not None:
                return node
            caller = self._caller(input)
            if caller is not None:
                self._check_input(input)
            return functional.group_norm(input, self.num_groups, weight, bias, self.eps, caller=caller)

    def _check_shape(self, input: Tensor) -> None:
        checks.check_input(input, self)
        if input.dim() >= 2:
            checks.check_channels(input, self.num_channels, self)
