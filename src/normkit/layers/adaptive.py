"""Adaptive instance normalization as a module."""

import torch
from torch import Tensor, nn

from .. import functional
from ..axes import position_axes
from ..errors import ShapeError
from ..functional import checks
from ..kernels.plain import samples as plain_samples
from .batch import resolve_num_features

__all__ = ["AdaptiveInstanceNorm"]


class AdaptiveInstanceNorm(nn.Module):
    """Give ``(N, C, *)`` the mean and deviation of a style: one that is passed, or one that was set.

    The formula and every convention stand at :func:`normkit.functional.adaptive_instance_norm`. Nothing is learnt. The
    style that was set is a buffer, mean 0 and deviation 1 at first, and is saved with the model.

    Args:
        num_features: C, at least 1.
        eps: added to the variances; its unit is that of the input squared. Not negative.
        device: where the state lives.
        dtype: the type of the state.

    Raises:
        ArgumentError: num_features or eps out of range.

    Example:
        >>> layer, content = AdaptiveInstanceNorm(1, eps=0.0), torch.tensor([[[1.0, 3.0]]])
        >>> layer(content, torch.tensor([[[10.0, 30.0, 10.0, 30.0]]]))
        tensor([[[10., 30.]]])
        >>> layer.set_style(torch.tensor([[[5.0, 7.0]]]))
        >>> layer(content)
        tensor([[[5., 7.]]])

    References:
        Huang and Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, 2017,
        arXiv:1703.06868, equation (8).
    """

    style_mean: Tensor
    style_std: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = resolve_num_features(num_features)
        checks.check_eps(eps)
        super().__init__()
        self.num_features, self.eps = size, eps
        self.register_buffer("style_mean", torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("style_std", torch.ones(size, device=device, dtype=dtype))

    def forward(self, input: Tensor, style: Tensor | None = None) -> Tensor:
        """Normalize the input and give it the style's statistics; None takes the style that was set."""
        self._check(input)
        if style is None:
            return functional.instance_norm(
                input, None, None, self.style_std, self.style_mean, True, 0.0, self.eps, caller=self
            )
        return functional.adaptive_instance_norm(input, style, self.eps, caller=self)

    @torch.no_grad()
    def set_style(self, style: Tensor) -> None:
        """Keep the statistics of one style image, ``(1, C, *)``.

        Raises:
            ShapeError: not one image, other channels, or one position.
        """
        self._check(style)
        if style.shape[0] != 1:
            checks.refuse(ShapeError, f"one style is kept, got {style.shape[0]}; pass style[:1]", self)
        mean, var = plain_samples.statistics(style, position_axes(style.dim()))
        self.style_mean.copy_(mean.flatten())
        self.style_std.copy_((var + self.eps).sqrt().flatten())

    def _check(self, x: Tensor) -> None:
        checks.check_input(x, self)
        checks.check_rank(x, (3, 4, 5), "(N, C, L), (N, C, H, W) or (N, C, D, H, W)", self)
        checks.check_channels(x, self.num_features, self)

    def extra_repr(self) -> str:
        """Describe the size and the setting."""
        return f"{self.num_features}, eps={self.eps}"
