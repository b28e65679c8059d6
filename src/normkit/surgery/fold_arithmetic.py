"""An affine map per channel absorbed by the convolution, transposed convolution or linear layer beside it.

In evaluation a batch norm is ``y = scale * x + shift`` per channel, with ``scale = weight / sqrt(running_var + eps)``
and ``shift = bias - running_mean * scale``. All here is computed in float64 and rounded once.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from ..errors import SurgeryError

__all__ = ["FOLDABLE", "Affine", "Linear", "absorb_after", "absorb_before", "affine_of", "channels_in", "channels_out"]

Linear = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

FOLDABLE: tuple[type[nn.Module], ...] = get_args(Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Affine:
    """``scale * x + shift``, both of shape ``(C,)`` in float64."""

    scale: Tensor
    shift: Tensor


def affine_of(norm: nn.Module) -> Affine:
    """Return what a batch norm does in evaluation.

    Raises:
        SurgeryError: a scale or a shift is not finite.

    >>> norm = nn.BatchNorm1d(1, eps=0.0)
    >>> _ = norm.running_mean.fill_(3.0), norm.running_var.fill_(4.0)
    >>> affine_of(norm)
    Affine(scale=tensor([0.5000], dtype=torch.float64), shift=tensor([-1.5000], dtype=torch.float64))
    """
    mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    assert mean is not None
    assert variance is not None
    scale = (variance.detach().double() + float(str(norm.eps))).rsqrt()
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean.detach().double() * scale
    if bias is not None:
        shift = shift + bias.detach().double()
    if not (torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        raise SurgeryError("its scale or shift is not finite; normkit.repair or normkit.recalibrate it first")
    return Affine(scale, shift)


def channels_out(layer: Linear) -> int:
    """Return how many channels a layer gives."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def channels_in(layer: Linear) -> int:
    """Return how many channels a layer takes."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def absorb_after(layer: Linear, affine: Affine) -> None:
    """Make ``layer`` compute ``scale * layer(x) + shift``: the norm stands after it.

    >>> linear = nn.Linear(1, 1)
    >>> _ = nn.init.constant_(linear.weight, 2.0), nn.init.constant_(linear.bias, 1.0)
    >>> absorb_after(linear, Affine(torch.tensor([3.0]).double(), torch.tensor([5.0]).double()))
    >>> linear.weight.item(), linear.bias.item()
    (6.0, 8.0)
    """
    weight = layer.weight.detach().double()
    if isinstance(layer, _TRANSPOSED):
        grouped = weight.unflatten(0, (layer.groups, -1))  # (G, C_in/G, C_out/G, *)
        scale = affine.scale.view(layer.groups, 1, -1, *(1 for _ in grouped.shape[3:]))
        weight = (grouped * scale).flatten(0, 1)
    else:
        weight = weight * affine.scale.view(-1, *(1 for _ in weight.shape[1:]))
    bias = affine.shift if layer.bias is None else layer.bias.detach().double() * affine.scale + affine.shift
    _write(layer, weight, bias)


def absorb_before(layer: Linear, affine: Affine) -> None:
    """Make ``layer`` compute ``layer(scale * x + shift)``: the norm stands before it.

    The shift becomes part of the bias, which is exact only where every output position sees all taps of the kernel on
    data, or where the shift is zero.

    >>> linear = nn.Linear(1, 1)
    >>> _ = nn.init.constant_(linear.weight, 2.0), nn.init.constant_(linear.bias, 1.0)
    >>> absorb_before(linear, Affine(torch.tensor([3.0]).double(), torch.tensor([5.0]).double()))
    >>> linear.weight.item(), linear.bias.item()
    (6.0, 11.0)
    """
    weight = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(layer, _TRANSPOSED):
        assert not affine.shift.any(), "checked by the caller: the taps differ from position to position"
        _write(layer, weight * affine.scale.view(-1, *(1 for _ in weight.shape[1:])), bias)
        return
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    grouped = weight.unflatten(0, (groups, -1))  # (G, C_out/G, C_in/G, *)
    kernel = [1 for _ in grouped.shape[3:]]
    if affine.shift.any():
        taps = (grouped * affine.shift.view(groups, 1, -1, *kernel)).flatten(2).sum(2).flatten()
        bias = taps if bias is None else bias + taps
    _write(layer, (grouped * affine.scale.view(groups, 1, -1, *kernel)).flatten(0, 1), bias)


def _write(layer: Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Round to the layer's type and store, in the parameters that are there."""
    kept = layer.weight
    rounded = weight.to(kept.dtype)
    rounded_bias = None if bias is None else bias.to(kept.dtype)
    if not torch.isfinite(rounded).all() or (rounded_bias is not None and not torch.isfinite(rounded_bias).all()):
        raise SurgeryError(f"the folded weight or bias does not fit into {kept.dtype}")
    with torch.no_grad():
        kept.copy_(rounded)
        if rounded_bias is None:
            return
        if layer.bias is None:
            layer.bias = nn.Parameter(rounded_bias, requires_grad=kept.requires_grad)
        else:
            layer.bias.copy_(rounded_bias)
