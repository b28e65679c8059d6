"""Local response normalization as a module: torch's class, with our function below it."""

import torch
from torch import Tensor, nn

from .. import functional
from ..functional.response import check_response
from .tracing import TracedAsTorch, torch_forward

__all__ = ["LocalResponseNorm"]


class LocalResponseNorm(TracedAsTorch, nn.LocalResponseNorm):
    """Local response normalization of ``(N, C, *)``: every value divided by the activity of neighbouring channels.

    The formula and every convention stand at :func:`normkit.functional.local_response_norm`. There is no state.

    Args:
        size: the number of channels in a window.
        alpha: the weight of the mean square, not negative.
        beta: the exponent.
        k: positive.

    Raises:
        ArgumentError: size, alpha or k out of range.

    Example:
        >>> import torch
        >>> LocalResponseNorm(2, alpha=2.0, beta=1.0)(torch.tensor([[[3.0], [4.0]]])).flatten()
        tensor([0.3000, 0.1538])

    References:
        Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep Convolutional Neural Networks, 2012, 3.3.
    """

    _torch_layer, _torch_forward = nn.LocalResponseNorm, torch_forward(nn.LocalResponseNorm)

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        check_response(size, alpha, beta, k)
        super().__init__(size, alpha, beta, k)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; see :func:`normkit.functional.local_response_norm` for formula and conventions."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._torch_forward(input)
        else:  # TorchScript compiles what follows a return
            node = self._as_node(input)
            if node is not None:
                return node
            caller = self._caller(input)
            return functional.local_response_norm(input, self.size, self.alpha, self.beta, self.k, caller=caller)
