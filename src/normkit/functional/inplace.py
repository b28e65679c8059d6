"""What batch normalization in place asks of its arguments where a gradient is recorded.

The output takes the place of the input, and the backward gets the normalized input back from it:
``xhat = (invert(y) - bias) / weight``. So the activation must have an inverse, and the weight must not be near zero.
"""

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..kernels.layouts import is_laid_out
from . import checks

__all__ = ["INVERTIBLE", "check_inplace", "is_recorded"]

# Activations whose output tells their input.
INVERTIBLE = (None, "leaky_relu")
# The normalized input is computed from y to about this many times the rounding error of y.
_LARGEST_LOSS = 1024.0
_ADVICE = "leave inplace=True out, or use it under torch.no_grad()"


def is_recorded(*tensors: Tensor | None) -> bool:
    """Tell whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_inplace(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    caller: nn.Module | None,
) -> None:
    """Refuse a call in place whose backward could not be computed from its output.

    Raises:
        ArgumentError: an activation without an inverse, a residual, half precision, an input that may not be
            overwritten, or a weight too near zero.
    """
    reason = _reason(x, residual, activation)
    if reason is None and not torch.compiler.is_compiling():
        # A compiled graph keeps what its backward needs, and copies the output over the input.
        reason = _reason_by_value(x, weight, bias)
    if reason is not None:
        checks.refuse(ArgumentError, f"inplace=True where a gradient is recorded: {reason}; {_ADVICE}", caller)


def _reason(x: Tensor, residual: Tensor | None, activation: str | None) -> str | None:
    if activation not in INVERTIBLE:
        return f"{activation} has no inverse, and the backward starts from the output; leaky_relu and None do"
    if residual is not None:
        return "the output does not tell the input and the residual apart"
    if x.dtype not in (torch.float32, torch.float64):
        return f"the input is {x.dtype}, too coarse to get the normalized input back; float32 and float64 are not"
    if x.is_leaf and x.requires_grad:
        return "the input is a leaf that requires a gradient, which autograd does not let anybody overwrite"
    return None


def _reason_by_value(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
    if x._is_view():
        return "the input is a view, so that its base would be overwritten; pass input.clone()"
    if not (is_laid_out(x, "contiguous") or is_laid_out(x, "channels_last")):
        return "the input is strided; pass input.contiguous()"
    largest = torch.zeros(()) if bias is None else bias.detach().abs()
    if weight is None:
        if bool((largest > _LARGEST_LOSS).any()):
            return f"a bias of {float(largest.max()):.3g} leaves too few digits of the normalized input in the output"
        return None
    scale = weight.detach().abs()
    # Below this a product of weight and input loses digits or is zero.
    bad = (scale < 1e-30) | (largest > _LARGEST_LOSS * scale) | ~scale.isfinite()
    if bool(bad.any()):
        channel = int(bad.nonzero()[0])
        beside = "" if bias is None else f", beside a bias of {float(bias[channel]):.3g}"
        return f"the weight of channel {channel} is {float(weight[channel]):.3g}{beside}: too near zero to divide by"
    return None
