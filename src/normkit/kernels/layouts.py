"""What a kernel may assume of the memory it is handed: the layouts it reads, and how a tensor comes into one.

The whole contract stands in docs/kernels.md.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import ArgumentError

__all__ = ["check_allocated", "contiguous_layout", "holds_values", "is_laid_out", "lay_out", "readable"]


def contiguous_layout(x: Tensor) -> str:
    """Name the layout that a tensor of as many dimensions has where it is contiguous."""
    return "contiguous" if x.dim() > 2 else "channels_last"


def is_laid_out(x: Tensor, layout: str) -> bool:
    """Tell whether a tensor lies in memory as a layout says."""
    return x.is_contiguous() if layout == "contiguous" or x.dim() == 2 else x.movedim(1, -1).is_contiguous()


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Return a tensor in a layout, copied where it lies otherwise."""
    if is_laid_out(x, layout):
        return x
    check_allocated(x)
    if layout == "contiguous" or x.dim() == 2:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def holds_values(x: Tensor) -> bool:
    """Tell whether what stands in memory at the address of a tensor are its values: no negative view, not freed."""
    return not x.is_neg() and x.data_ptr() != 0


def readable(x: Tensor) -> Tensor:
    """Return a dense tensor whose memory holds its values as they are: x itself, or a copy with the same strides.

    A negative view, as ``z.conj().imag`` is one, holds them with the other sign, and a ZeroTensor holds none.

    Raises:
        ArgumentError: the storage was freed.
    """
    # One that a transform of torch.func wraps has no memory, and goes to no kernel.
    if not torch._C._has_storage(x) or holds_values(x) or x.numel() == 0:
        return x
    check_allocated(x)
    return torch.empty_like(x).copy_(x.detach())


def check_allocated(x: Tensor, name: str = "a tensor") -> None:
    """Refuse a tensor whose storage was freed: torch itself would read at address zero.

    Raises:
        ArgumentError: it was.
    """
    if type(x) is not Tensor and type(x) is not Parameter:
        # A stand-in of a graph that is compiled has no memory to look at.
        return
    if x.data_ptr() == 0 and x.numel() > 0 and not x._is_zerotensor() and not x.is_meta:
        reason = f"{name} of shape {tuple(x.shape)} has no memory: its storage was freed, as between two uses of a"
        raise ArgumentError(f"{reason} sharded parameter; gather it again before this call")
