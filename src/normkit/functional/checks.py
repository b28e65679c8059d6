"""What a normalization refuses, and the words it says. Nothing has changed when one of these raises.

Every message says what was wrong, what came, what is allowed and what to type instead. `caller` is the layer, or None
where the function was called bare; it is described only once something is wrong.
"""

import math
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..axes import values_per_channel
from ..errors import ArgumentError, DtypeError, NormkitError, ShapeError

__all__ = [
    "check_channels",
    "check_eps",
    "check_input",
    "check_match",
    "check_momentum",
    "check_parameter",
    "check_rank",
    "check_values_per_channel",
    "refuse",
]

_HALF = (torch.float16, torch.bfloat16)


def refuse(error: type[NormkitError], message: str, caller: nn.Module | None) -> NoReturn:
    """Raise the error, naming the layer that was called."""
    name = "" if caller is None else f"{type(caller).__name__}({caller.extra_repr().split(',')[0]}): "
    raise error(name + message)


def check_input(x: object, caller: nn.Module | None = None) -> None:
    """Refuse what is not a dense tensor of real floating point numbers.

    Raises:
        DtypeError: x is no tensor, sparse, of integers, or complex.
    """
    if not isinstance(x, Tensor):
        advice = "torch.as_tensor(input)" if x is not None else "the output of the layer before"
        refuse(DtypeError, f"the input must be a tensor, got {type(x).__name__}; pass {advice}", caller)
    if x.layout is not torch.strided:
        refuse(DtypeError, f"the input must be a dense tensor, got layout {x.layout}; pass input.to_dense()", caller)
    if x.is_complex():
        refuse(
            DtypeError, f"complex numbers are not normalized, got {x.dtype}; pass torch.view_as_real's parts", caller
        )
    if not x.is_floating_point():
        refuse(
            DtypeError,
            f"the input must be floating point, got {x.dtype}; pass input.float(), scaled to the range you train on",
            caller,
        )


def check_rank(x: Tensor, allowed: tuple[int, ...], layout: str, caller: nn.Module | None = None) -> None:
    """Refuse a tensor whose number of dimensions is not among the allowed.

    Raises:
        ShapeError: the rank is wrong; the message says how to reshape.
    """
    if x.dim() in allowed:
        return
    words = " or ".join(f"{rank}D" for rank in allowed)
    advice = ""
    if x.dim() == min(allowed) - 1 and min(allowed) > 2:
        advice = "; for a single sample without batch dimension pass input.unsqueeze(0)"
    elif x.dim() > max(allowed):
        advice = f"; to treat the rest as positions pass input.flatten({max(allowed) - 1})"
    shape = tuple(x.shape)
    refuse(ShapeError, f"expected {words} input (got {x.dim()}D input), shape {shape}, not {layout}{advice}", caller)


def check_channels(x: Tensor, channels: int, caller: nn.Module | None = None) -> None:
    """Refuse a tensor without channels, or whose dimension 1 does not hold this many.

    Raises:
        ShapeError: the channel count is wrong; the message names a dimension that would fit.
    """
    if x.shape[1] == channels > 0:
        return
    shape = tuple(x.shape)
    if x.shape[1] == 0:
        refuse(ShapeError, f"the input has no channels: dimension 1 of shape {shape} is 0", caller)
    fitting = [axis for axis in range(2, x.dim()) if shape[axis] == channels]
    if fitting:
        advice = f"dimension {fitting[-1]} has {channels}: pass input.movedim({fitting[-1]}, 1)"
    else:
        advice = f"the layer before puts out {shape[1]}: build this one with num_features={shape[1]}"
    refuse(ShapeError, f"expected {channels} channels in dimension 1, got {shape[1]} (shape {shape}); {advice}", caller)


def check_values_per_channel(x: Tensor, caller: nn.Module | None = None) -> None:
    """Refuse a training batch with a single value per channel, which has no variance.

    Raises:
        ShapeError: one value per channel.
    """
    if values_per_channel(tuple(x.shape)) == 1:
        refuse(
            ShapeError,
            f"Expected more than 1 value per channel when training, got input size {list(x.shape)}; one value has no "
            "variance. If this is the last batch, pass drop_last=True to the training DataLoader; to predict, call "
            "model.eval()",
            caller,
        )


def check_parameter(name: str, value: Tensor | None, x: Tensor, caller: nn.Module | None = None) -> None:
    """Refuse a weight, bias or running statistic that does not match x in size, type or device.

    A parameter has the type of x, or is float32 where x is float16 or bfloat16.

    Raises:
        ShapeError: not one value per channel.
        DtypeError: a mix of types that would lose digits silently, or of devices.
    """
    if value is None:
        return
    if value.dim() != 1 or value.shape[0] != x.shape[1]:
        got = tuple(value.shape)
        refuse(ShapeError, f"{name} must have shape ({x.shape[1]},), one value per channel, got {got}", caller)
    check_match(name, value, x, caller)


def check_match(name: str, value: Tensor, x: Tensor, caller: nn.Module | None = None) -> None:
    """Refuse a weight, bias or running statistic of another type or device than x; its size may be unknown yet.

    Raises:
        DtypeError: as for ``check_parameter``.
    """
    if value.dtype != x.dtype and not (x.dtype in _HALF and value.dtype == torch.float32):
        refuse(
            DtypeError,
            f"mixed dtype: the input is {x.dtype} and {name} is {value.dtype}; allowed are the same type, or float32 "
            f"{name} with float16 or bfloat16 input. Pass input.to({value.dtype})",
            caller,
        )
    if value.device != x.device:
        refuse(
            DtypeError, f"the input is on {x.device} and {name} on {value.device}; move one with .to(device)", caller
        )


def check_eps(eps: object, *, positive: bool = False, caller: nn.Module | None = None) -> None:
    """Refuse an eps that is negative, not finite or no number; with ``positive`` also zero.

    Raises:
        ArgumentError: eps is out of range. The words are torch's.
    """
    if isinstance(eps, bool) or not isinstance(eps, Real):
        refuse(ArgumentError, f"eps must be a number, got {type(eps).__name__} {eps!r}; pass eps=1e-5", caller)
    value = float(eps)
    if positive and not value > 0:
        refuse(ArgumentError, f"batch_norm eps must be positive, but got {eps}; pass eps=1e-5", caller)
    if not (math.isfinite(value) and value >= 0):
        refuse(ArgumentError, f"eps must be finite and non-negative, got {eps}; pass eps=1e-5", caller)


def check_momentum(momentum: object, caller: nn.Module | None = None) -> None:
    """Refuse a momentum outside 0 to 1.

    Raises:
        ArgumentError: momentum is out of range or no number.
    """
    if momentum is None:
        return
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        refuse(
            ArgumentError,
            f"momentum must be a number from 0 to 1 or None, got {type(momentum).__name__} {momentum!r}; "
            "pass momentum=0.1",
            caller,
        )
    if not 0 <= float(momentum) <= 1:
        refuse(
            ArgumentError,
            f"momentum must be from 0 to 1, got {momentum}; it is the weight of the new batch. "
            "To say the weight of the old value pass decay=",
            caller,
        )
