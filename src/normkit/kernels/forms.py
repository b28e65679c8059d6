"""How the kernels of per-sample normalization see a tensor: samples, channels in groups, positions, and memory."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Form", "form_of", "form_of_groups", "form_of_layer", "form_of_rows", "form_of_shape"]


class Form(NamedTuple):
    """One normalization of one shape: N samples of C channels in groups, S positions, and how they lie in memory.

    A tuple, because every call looks its plan up by it.

    ``layout`` is "elementwise" where a sample is C elements with a weight each, "contiguous" or "channels_last" as it
    lies in memory.
    """

    layout: str
    samples: int
    channels: int
    positions: int
    groups: int


def form_of_rows(x: Tensor, trailing: int) -> Form | None:
    """Return how the last dimensions of x lie in memory, or None where x is not contiguous."""
    return _rows(x.shape, trailing) if x.is_contiguous() else None


@functools.lru_cache(maxsize=4096)
def _rows(shape: torch.Size, trailing: int) -> Form:
    width = math.prod(shape[-trailing:])
    return Form("elementwise", shape.numel() // width, width, 1, 1)


def form_of(x: Tensor, groups: int) -> Form | None:
    """Return how ``(N, C, *)`` in groups lies in memory, or None where neither channels nor positions are together.

    In which order the positions of a channel lie makes no difference.
    """
    if x.is_contiguous():
        return form_of_groups(x.shape, "contiguous", groups)
    order = sorted(range(2, x.dim()), key=x.stride, reverse=True)
    if x.permute(0, *order, 1).is_contiguous():
        return form_of_groups(x.shape, "channels_last", groups)
    if x.permute(0, 1, *order).is_contiguous():
        return form_of_groups(x.shape, "contiguous", groups)
    return None


@functools.lru_cache(maxsize=4096)
def form_of_groups(shape: torch.Size, layout: str, groups: int) -> Form:
    """Return the form of ``(N, C, *)`` in groups, contiguous or channels-last."""
    samples, channels = shape[:2]
    positions = shape.numel() // (samples * channels)
    return Form(layout if positions > 1 else "elementwise", samples, channels, positions, groups)


def form_of_shape(shape: torch.Size, groups: int | None, trailing: int) -> Form:
    """Return the form that a shape has in contiguous memory, with statistics of groups or of trailing dimensions."""
    return _rows(shape, trailing) if groups is None else form_of_groups(shape, "contiguous", groups)


def form_of_layer(layer: nn.Module, shape: torch.Size) -> Form:
    """Return the form that a shape has in contiguous memory for one of torch's layer, RMS, group or instance norms."""
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return form_of_shape(shape, None, len(layer.normalized_shape))
    return form_of_shape(shape, layer.num_groups if isinstance(layer, nn.GroupNorm) else shape[1], 0)
