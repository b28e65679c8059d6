"""What comes back from autograd is looked at again: a hook may have changed a saved tensor on the way.

Hooks on saved tensors, of `torch.autograd.graph`, of activation offloading, of a compression, may hand back another
memory format or type, or a view that holds its values in another way. A kernel reads addresses, so what came back is
brought into the form that was saved, or refused.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import DtypeError, ShapeError
from .layouts import lay_out, readable

__all__ = ["are_as_saved", "check_device", "is_hooked", "restore", "restore_statistics", "restore_values"]

_ADVICE = "what a hook unpacks must be what it packed, though its memory format and its type may differ"


def is_hooked() -> bool:
    """Tell whether what is saved now goes through hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def are_as_saved(
    like: Tensor,
    strides: tuple[int, ...],
    sizes: tuple[int, int],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    other: Tensor | None = None,
) -> bool:
    """Tell whether a kernel may take what came back as what was saved.

    Nothing tells that a hook was put on a single saved tensor, so that this is asked in every backward. A negative view
    of anything but the statistics is copied where its address is taken.

    Args:
        like: the gradient of the output.
        strides: those of x, as it was saved.
        sizes: how many numbers the weight has, and how many the statistics.
        x: the input.
        weight: of the type of x, or float32.
        bias: likewise.
        statistics: as a kernel makes them, contiguous float64.
        other: the output or the residual, which lies as x does.
    """
    cpu, dtype, shape, (numbers, groups) = like.is_cpu, like.dtype, like.shape, sizes
    return (
        x.stride() == strides
        and x.dtype is dtype
        and x.shape == shape
        and x.is_cpu is cpu
        and statistics.dtype is torch.float64
        and statistics.is_contiguous()
        and not statistics.is_neg()
        and statistics.numel() == groups
        and statistics.is_cpu is cpu
        and (weight is None or _is_parameter(weight, numbers, dtype, cpu))
        and (bias is None or _is_parameter(bias, numbers, dtype, cpu))
        and (
            other is None
            or (other.stride() == strides and other.dtype is dtype and other.shape == shape and other.is_cpu is cpu)
        )
    )


def _is_parameter(value: Tensor, numbers: int, dtype: torch.dtype, cpu: bool) -> bool:
    return (value.dtype is dtype or value.dtype is torch.float32) and value.numel() == numbers and value.is_cpu is cpu


def restore(name: str, x: Tensor, like: Tensor, layout: str | None = None) -> Tensor:
    """Return a tensor that was saved in the type of ``like``, and laid out as a layout says.

    Raises:
        ShapeError: it came back in another shape than that of ``like``.
        DtypeError: it came back on another device, or as no real numbers.
    """
    _check(name, x.shape == like.shape, f"{tuple(like.shape)}", x, like)
    x = _plain(x)
    if x.dtype is not like.dtype:
        x = x.to(like.dtype)
    return x if layout is None else lay_out(x, layout)


def restore_values(name: str, values: Tensor | None, numbers: int, like: Tensor) -> Tensor | None:
    """Return a weight, a bias or statistics that were saved; what uses them takes any type and strides.

    Raises:
        ShapeError: they came back as another number of values.
        DtypeError: they came back on another device than that of ``like``, or as no real numbers.
    """
    if values is None:
        return None
    _check(name, values.numel() == numbers, f"{numbers} numbers", values, like)
    return _plain(values)


def restore_statistics(saved: Tensor, numbers: int, like: Tensor) -> Tensor:
    """Return the statistics that a kernel saved as it saved them, contiguous float64.

    Raises:
        ShapeError: as for `restore_values`.
        DtypeError: as for `restore_values`.
    """
    _check("statistics", saved.numel() == numbers, f"{numbers} numbers", saved, like)
    return readable(_plain(saved).to(torch.float64).contiguous())


def check_device(name: str, came: Tensor | None, like: Tensor) -> None:
    """Refuse what came back on another device than that of ``like``.

    Raises:
        DtypeError: it did.
    """
    if came is not None and came.device != like.device:
        raise DtypeError(
            f"the saved {name} came back from a hook on {came.device}, saved was {like.device}; {_ADVICE}, and the "
            "hook must bring it back to its device"
        )


def _plain(x: Tensor) -> Tensor:
    """Return a tensor of a class of its own as torch's: what is computed from it would be of that class too."""
    if type(x) is Tensor or type(x) is Parameter:
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def _check(name: str, fits: bool, expected: str, came: Tensor, like: Tensor) -> None:
    if not fits:
        got = tuple(came.shape)
        raise ShapeError(f"the saved {name} came back from a hook with shape {got}, saved was {expected}; {_ADVICE}")
    check_device(name, came, like)
    if not came.is_floating_point():
        raise DtypeError(f"the saved {name} came back from a hook as {came.dtype}, saved were real numbers; {_ADVICE}")
