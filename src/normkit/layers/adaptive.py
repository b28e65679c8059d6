"""Adaptive instance normalization as a module."""

import torch
from torch import Tensor

from .. import functional
from ..axes import position_axes
from ..errors import ArgumentError, ShapeError
from ..functional import checks
from ..functional.adaptive import check_style
from ..kernels.plain import samples as plain_samples
from .batch import resolve_num_features
from .tracing import Unscriptable

__all__ = ["AdaptiveInstanceNorm"]


class AdaptiveInstanceNorm(Unscriptable):
    """Give ``(N, C, *)`` the mean and deviation of a style: one that is passed, or one that was set.

    The formula and every convention stand at :func:`normkit.functional.adaptive_instance_norm`. Nothing is learnt. The
    style that was set is a buffer, mean 0 and deviation 1 at first, and is saved with the model. Without a style,
    passed or set, the layer would be an instance norm, and refuses.

    Args:
        num_features: C, at least 1.
        eps: added to the variances; its unit is that of the input squared. Not negative.
        device: where the state lives.
        dtype: the type of the state.

    Raises:
        ArgumentError: num_features or eps out of range; in the forward, no style.

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
    _has_style: bool = False

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
        node = self._as_node(input, style)
        if node is not None:
            return node
        caller = self._caller(input)
        if caller is not None:
            self._check_input(input)
        if style is None:
            if caller is not None and not self._has_style:
                self._check_style()
            return functional.instance_norm(
                input, None, None, self.style_std, self.style_mean, True, 0.0, self.eps, caller=caller
            )
        return functional.adaptive_instance_norm(input, style, self.eps, caller=caller)

    @torch.no_grad()
    def set_style(self, style: Tensor) -> None:
        """Keep the statistics of one style image, ``(1, C, *)``.

        Raises:
            ShapeError: not one image, other channels, or one position.
        """
        self._check_input(style)
        if style.shape[0] != 1:
            checks.refuse(ShapeError, f"one style is kept, got {style.shape[0]}; pass style[:1]", self)
        check_style(style, self)
        mean, var = plain_samples.statistics(style, position_axes(style.dim()))
        self.style_mean.copy_(mean.flatten())
        self.style_std.copy_((var + self.eps).sqrt().flatten())
        self._has_style = True

    def _check_style(self) -> None:
        """Refuse a forward without any style; buffers that were filled by hand or by a state dict are one."""
        if self.style_mean.is_meta or checks.is_tracing() or torch.compiler.is_compiling():
            return
        if not self.style_mean.any() and bool((self.style_std == 1).all()):
            checks.refuse(
                ArgumentError,
                "there is no style, and without one this is an instance norm; pass layer(input, style), keep one with "
                "layer.set_style(style), or take normkit.InstanceNorm2d",
                self,
            )
        self._has_style = True

    def _check_shape(self, input: Tensor) -> None:
        checks.check_input(input, self)
        checks.check_rank(input, (3, 4, 5), "(N, C, L), (N, C, H, W) or (N, C, D, H, W)", self)
        checks.check_channels(input, self.num_features, self)

    def extra_repr(self) -> str:
        """Describe the size and the setting."""
        return f"{self.num_features}, eps={self.eps}"
