"""What a normalization does in evaluation, where that is an affine map: scale and shift of each channel."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .evidence import bare_copy
from .layers import NormLayer

__all__ = ["Affine", "affine_in_evaluation"]

# Methods that normalize with stored statistics in evaluation, per channel.
_PER_CHANNEL = ("batch", "sync", "renorm", "ghost", "masked")


@dataclass(frozen=True)
class Affine:
    """``scale * (mixing @ x) + shift`` over the channels of x, in float64 on the CPU or the layer's own device.

    Attributes:
        scale, shift: ``(C,)``.
        mixing: ``(C, C)`` for a layer that mixes channels, as whitening does; None where each channel stands alone.
    """

    scale: Tensor
    shift: Tensor
    mixing: Tensor | None = None


def affine_in_evaluation(layer: NormLayer) -> Affine | str:
    """Return what a layer does in evaluation, without its tail; or why that is no affine map of the channels.

    The mode that the layer is in is the caller's business, and so is a mask: a masked layer is affine only where it is
    called without one.

    >>> from normkit.anatomy import norm_layers
    >>> norm = nn.BatchNorm1d(1, eps=0.0)
    >>> _ = norm.running_mean.fill_(3.0), norm.running_var.fill_(4.0)
    >>> affine_in_evaluation(norm_layers(norm)[0])
    Affine(scale=tensor([0.5000], dtype=torch.float64), shift=tensor([-1.5000], dtype=torch.float64), mixing=None)
    >>> affine_in_evaluation(norm_layers(nn.GroupNorm(1, 2))[0])
    'a GroupNorm computes its statistics from the input, in evaluation too'
    """
    name = type(layer.module).__name__
    if layer.lazy:
        return "it is lazy and has no channels yet"
    if layer.form is None:
        return layer.unread
    if layer.form.method == "whitening":
        affine = _of_whitening(layer.module)
    elif layer.form.method in (*_PER_CHANNEL, "instance") and layer.tracks:
        affine = _per_channel(layer)
    elif layer.form.method in _PER_CHANNEL:
        return "it has no running statistics"
    else:
        return f"a {name} computes its statistics from the input, in evaluation too"
    if affine is None:
        return "it has no running statistics"
    if not all(torch.isfinite(values).all() for values in (affine.scale, affine.shift)):
        return "its scale or shift is not finite; normkit.repair or normkit.recalibrate it first"
    return affine


def _per_channel(layer: NormLayer) -> Affine | None:
    mean, variance = layer.mean, layer.var
    if mean is None or variance is None:
        return None
    scale = (_flat(variance) + layer.eps).rsqrt()
    weight = layer.effective_weight
    if weight is not None:
        scale = scale * _flat(weight)
    shift = -_flat(mean) * scale
    return Affine(scale, shift if layer.bias is None else shift + _flat(layer.bias))


def _flat(values: Tensor) -> Tensor:
    return values.detach().double().flatten()


def _of_whitening(module: nn.Module) -> Affine | None:
    """Ask a copy for its answers to the unit vectors: the matrix is then the layer's own."""
    mean = module._buffers.get("running_mean")
    if mean is None:
        return None
    work = bare_copy(module).eval()
    channels = mean.numel()
    spatial = {"1d": 0, "2d": 2, "3d": 3}[type(module).__name__[-2:]]
    shape = (-1, channels, *(1 for _ in range(spatial)))
    with torch.no_grad():
        at_zero = work(torch.zeros(channels, dtype=torch.float64).view(shape)).flatten()
        columns = work(torch.eye(channels, dtype=torch.float64).view(shape)).view(channels, channels) - at_zero
    return Affine(torch.ones_like(at_zero), at_zero, columns.T.contiguous())
