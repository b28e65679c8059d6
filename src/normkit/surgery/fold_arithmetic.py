"""An affine map of the channels absorbed by the convolution, transposed convolution or linear layer beside it.

In evaluation a batch norm is ``y = A x + shift`` over the channels; ``A`` is diagonal, ``weight / sqrt(running_var +
eps)``, but for a layer that mixes channels, as whitening does. All here is computed in float64 and rounded once.
"""

from typing import get_args

import torch
from torch import Tensor, nn

from ..anatomy import Affine
from ..errors import SurgeryError

__all__ = [
    "FOLDABLE",
    "Linear",
    "absorb_after",
    "absorb_before",
    "groups_of",
    "input_axis",
    "output_axis",
    "spread_after",
    "spread_before",
]

Linear = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

FOLDABLE: tuple[type[nn.Module], ...] = get_args(Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def groups_of(layer: nn.Module) -> int:
    """Return the number of groups of a convolution; 1 for what has none."""
    groups = getattr(layer, "groups", 1)
    return groups if isinstance(groups, int) else 1


def output_axis(layer: nn.Module) -> int:
    """Return the axis of the weight that counts the outputs (of one group, where the layer is transposed)."""
    return 1 if isinstance(layer, _TRANSPOSED) else 0


def input_axis(layer: nn.Module) -> int:
    """Return the axis of the weight that counts the inputs (of one group, unless the layer is transposed)."""
    return 0 if isinstance(layer, _TRANSPOSED) else 1


def spread_after(affine: Affine, channels: Tensor | None) -> Affine | str:
    """Return the map over a layer's outputs where the norm's channel j is the layer's output ``channels[j]``.

    >>> affine = Affine(torch.tensor([2.0, 3.0]).double(), torch.zeros(2).double())
    >>> spread_after(affine, torch.tensor([1, 0])).scale
    tensor([3., 2.], dtype=torch.float64)
    """
    if channels is None:
        return affine
    if affine.mixing is not None:
        return "it mixes channels, and what stands between moves them"
    count = int(channels.max()) + 1
    scale, shift = (values.new_full((count,), float("nan")) for values in (affine.scale, affine.shift))
    scale[channels], shift[channels] = affine.scale, affine.shift
    same = torch.equal(scale[channels], affine.scale) and torch.equal(shift[channels], affine.shift)
    if not same or not torch.isfinite(scale).all():
        return "several of its channels come from one output, and it treats them differently"
    return Affine(scale, shift)


def spread_before(affine: Affine, channels: Tensor | None) -> Affine | str:
    """Return the map over a layer's inputs where input i is the norm's channel ``channels[i]``."""
    if channels is None:
        return affine
    if affine.mixing is not None:
        return "it mixes channels, and what stands between moves them"
    return Affine(affine.scale[channels], affine.shift[channels])


def absorb_after(layer: nn.Module, affine: Affine, axis: int | None = None) -> None:
    """Make ``layer`` compute ``A layer(x) + shift``: the norm stands after it.

    Args:
        layer: it has a weight, and a bias or none.
        affine: over its outputs.
        axis: which axis of the weight counts the outputs, where the class does not say.

    Raises:
        SurgeryError: the map mixes channels of several groups, or a result does not fit the layer's type.

    >>> linear = nn.Linear(1, 1)
    >>> _ = nn.init.constant_(linear.weight, 2.0), nn.init.constant_(linear.bias, 1.0)
    >>> absorb_after(linear, Affine(torch.tensor([3.0]).double(), torch.tensor([5.0]).double()))
    >>> linear.weight.item(), linear.bias.item()
    (6.0, 8.0)
    """
    old, given = _weight(layer), _bias(layer)
    axis = output_axis(layer) if axis is None else axis
    if isinstance(layer, _TRANSPOSED):
        grouped = old.unflatten(0, (groups_of(layer), -1)).movedim(2, 1)  # (G, C_out/G, C_in/G, *)
        weight = _mixed(affine, grouped).movedim(1, 2).flatten(0, 1)
    else:
        outputs = old.movedim(axis, 0)
        grouped = outputs.unflatten(0, (groups_of(layer), -1))  # (G, C_out/G, C_in/G, *)
        weight = _mixed(affine, grouped).flatten(0, 1).movedim(0, axis)
    bias = affine.shift
    if given is not None:
        bias = bias + _mixed(affine, given.view(groups_of(layer), -1)).flatten()
    _write(layer, weight, bias)


def absorb_before(layer: nn.Module, affine: Affine, axis: int | None = None) -> None:
    """Make ``layer`` compute ``layer(A x + shift)``: the norm stands before it.

    The shift becomes part of the bias, which is exact only where every output position sees all taps of the kernel on
    data, or where the shift is zero.

    >>> linear = nn.Linear(1, 1)
    >>> _ = nn.init.constant_(linear.weight, 2.0), nn.init.constant_(linear.bias, 1.0)
    >>> absorb_before(linear, Affine(torch.tensor([3.0]).double(), torch.tensor([5.0]).double()))
    >>> linear.weight.item(), linear.bias.item()
    (6.0, 11.0)
    """
    old, bias = _weight(layer), _bias(layer)
    groups = groups_of(layer)
    if isinstance(layer, _TRANSPOSED):
        assert not affine.shift.any(), "checked by the caller: the taps differ from position to position"
        weight = _mixed(affine, old.unflatten(0, (groups, -1)), transposed=True).flatten(0, 1)
        _write(layer, weight, bias)
        return
    inputs = old.movedim(input_axis(layer) if axis is None else axis, 1)
    grouped = inputs.unflatten(0, (groups, -1)).movedim(2, 1)  # (G, C_in/G, C_out/G, *)
    if affine.shift.any():
        shift = affine.shift.view(groups, -1, *(1 for _ in grouped.shape[2:]))
        taps = (grouped * shift).sum(1).reshape(*grouped.shape[:1], grouped.shape[2], -1).sum(2).flatten()
        bias = taps if bias is None else bias + taps
    mixed = _mixed(affine, grouped, transposed=True).movedim(1, 2).flatten(0, 1)
    _write(layer, mixed.movedim(1, input_axis(layer) if axis is None else axis), bias)


def _mixed(affine: Affine, grouped: Tensor, *, transposed: bool = False) -> Tensor:
    """Apply the map, or its transpose, to dimension 1 of ``(G, C/G, *)``."""
    groups, each = grouped.shape[:2]
    if affine.mixing is None:
        return grouped * affine.scale.view(groups, each, *(1 for _ in grouped.shape[2:]))
    matrix = affine.scale[:, None] * affine.mixing
    blocks = matrix.view(groups, each, groups, each)
    own = blocks[range(groups), :, range(groups), :]
    if float(matrix.abs().sum() - own.abs().sum()) > 0:
        raise SurgeryError("it mixes channels that are in different groups of the layer beside it")
    return torch.einsum("gji,gj...->gi..." if transposed else "gij,gj...->gi...", own, grouped)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().double()


def _bias(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return bias.detach().double() if isinstance(bias, Tensor) else None


def _write(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Round to the layer's type and store, in the parameters that are there."""
    kept = layer.weight
    assert isinstance(kept, Tensor)
    rounded = weight.to(kept.dtype)
    rounded_bias = None if bias is None else bias.to(kept.dtype)
    if not torch.isfinite(rounded).all() or (rounded_bias is not None and not torch.isfinite(rounded_bias).all()):
        raise SurgeryError(f"the folded weight or bias does not fit into {kept.dtype}")
    with torch.no_grad():
        own = getattr(layer, "bias", None)
        if rounded_bias is not None and isinstance(own, Tensor):
            own.copy_(rounded_bias)
        elif rounded_bias is not None:
            vars(layer).pop("bias", None)
            layer.bias = nn.Parameter(rounded_bias, requires_grad=kept.requires_grad)
        kept.copy_(rounded)
