"""What comes back from autograd is looked at again: a hook may have changed a saved tensor on the way.

Hooks on saved tensors, of `torch.autograd.graph`, of activation offloading, of a compression, may hand back another
memory format or type. A kernel reads addresses, so what came back is brought into the form that was saved, or refused.
"""

import torch
from torch import Tensor

from ..errors import DtypeError, ShapeError
from .layouts import lay_out

__all__ = ["is_hooked", "restore", "restore_statistics", "restore_values"]

_ADVICE = "what a hook unpacks must be what it packed, though its memory format and its type may differ"


def is_hooked() -> bool:
    """Tell whether what is saved now goes through hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def restore(name: str, x: Tensor, like: Tensor, layout: str | None = None) -> Tensor:
    """Return a tensor that was saved in the type of ``like``, and laid out as a layout says.

    Raises:
        ShapeError: it came back in another shape than that of ``like``.
        DtypeError: it came back on another device.
    """
    _check(name, x.shape == like.shape, f"{tuple(like.shape)}", x, like)
    if x.dtype is not like.dtype:
        x = x.to(like.dtype)
    return x if layout is None else lay_out(x, layout)


def restore_values(name: str, values: Tensor | None, numbers: int, like: Tensor) -> Tensor | None:
    """Return a weight, a bias or statistics that were saved; what uses them takes any type and strides.

    Raises:
        ShapeError: they came back as another number of values.
        DtypeError: they came back on another device than that of ``like``.
    """
    if values is not None:
        _check(name, values.numel() == numbers, f"{numbers} numbers", values, like)
    return values


def restore_statistics(saved: Tensor, numbers: int, like: Tensor) -> Tensor:
    """Return the statistics that a kernel saved as it saved them, contiguous float64.

    Raises:
        ShapeError: as for `restore_values`.
        DtypeError: as for `restore_values`.
    """
    _check("statistics", saved.numel() == numbers, f"{numbers} numbers", saved, like)
    return saved.to(torch.float64).contiguous()


def _check(name: str, fits: bool, expected: str, came: Tensor, like: Tensor) -> None:
    if not fits:
        got = tuple(came.shape)
        raise ShapeError(f"the saved {name} came back from a hook with shape {got}, saved was {expected}; {_ADVICE}")
    if came.device != like.device:
        raise DtypeError(
            f"the saved {name} came back from a hook on {came.device}, saved was {like.device}; {_ADVICE}, and the "
            "hook must bring it back to its device"
        )
