"""The two layouts that kernels read, planes and rows, and how a tensor comes into one."""

from torch import Tensor

__all__ = ["contiguous_layout", "is_laid_out", "lay_out"]


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
    if layout == "contiguous" or x.dim() == 2:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
