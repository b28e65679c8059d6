"""Root mean square normalization as a module: torch's class, with our function below it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional
from ..functional import checks
from .layer import resolve_normalized_shape
from .tracing import TracedAsTorch, torch_forward

__all__ = ["RMSNorm"]


class RMSNorm(TracedAsTorch, nn.RMSNorm):
    """Root mean square normalization of ``(*, *normalized_shape)``: layer normalization without mean and bias.

    ``y = x / sqrt(mean(x^2) + eps) * weight``. The formula and every convention stand at
    :func:`normkit.functional.rms_norm`. ``state_dict`` is torch's, in both directions.

    Args:
        normalized_shape: the sizes of the last dimensions, or the size of the last one; all at least 1.
        eps: added to the mean square; its unit is that of the input squared. Not negative; None for torch's default,
            the spacing at one of the type computed in.
        elementwise_affine: learn a weight, which starts at 1.
        device: where the state lives.
        dtype: the type of the state.

    Raises:
        ArgumentError: normalized_shape or eps out of range.

    Example:
        >>> RMSNorm(4)(torch.tensor([2.0, -2.0, 2.0, 2.0])).detach()
        tensor([ 1., -1.,  1.,  1.])

    References:
        Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, equation (4).
    """

    _torch_layer, _torch_forward = nn.RMSNorm, torch_forward(nn.RMSNorm)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if eps is not None:
            checks.check_eps(eps)
        super().__init__(resolve_normalized_shape(normalized_shape), eps, elementwise_affine, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; see :func:`normkit.functional.rms_norm` for formula and conventions."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._torch_forward(input)
        else:  # TorchScript compiles what follows a return
            node = self._as_node(input)
            if node is not None:
                return node
            caller = self._caller(input)
            return functional.rms_norm(input, self.normalized_shape, self.weight, self.eps, caller=caller)
