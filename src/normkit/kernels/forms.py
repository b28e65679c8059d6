"""How the kernels of per-sample normalization see a tensor: samples, channels in groups, positions, and memory."""

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Form", "form_of", "form_of_rows"]


@dataclass(frozen=True, slots=True)
class Form:
    """One normalization of one shape: N samples of C channels in groups, S positions, and how they lie in memory.

    ``layout`` is "rows" where a sample is C elements with a weight each, "planes" for contiguous ``(N, C, *)``, or
    "columns" for channels-last.
    """

    layout: str
    samples: int
    channels: int
    positions: int
    groups: int


def form_of_rows(x: Tensor, trailing: int) -> Form | None:
    """Return how the last dimensions of x lie in memory, or None where x is not contiguous."""
    if not x.is_contiguous():
        return None
    width = x.shape[-1] if trailing == 1 else math.prod(x.shape[-trailing:])
    return Form("rows", x.numel() // width, width, 1, 1)


def form_of(x: Tensor, groups: int) -> Form | None:
    """Return how ``(N, C, *)`` in groups lies in memory, or None where neither channels nor positions are together.

    In which order the positions of a channel lie makes no difference.
    """
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    if x.is_contiguous():
        return Form("planes" if positions > 1 else "rows", samples, channels, positions, groups)
    order = sorted(range(2, x.dim()), key=x.stride, reverse=True)
    if x.permute(0, *order, 1).is_contiguous():
        return Form("columns" if positions > 1 else "rows", samples, channels, positions, groups)
    if x.permute(0, 1, *order).is_contiguous():
        return Form("planes", samples, channels, positions, groups)
    return None
