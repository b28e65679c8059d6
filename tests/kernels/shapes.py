"""Shapes that reach every way the CPU kernels cut their work, large enough for several threads."""

import torch
from torch import Tensor

from normkit.kernels.numba.channels import passes as channel_passes

# Name: shape, layout in memory, whether one task takes a channel from statistics to output.
WAYS = {
    "contiguous": ((8, 32, 29, 27), "contiguous", True),
    "contiguous, tiny": ((64, 128, 7, 7), "contiguous", True),
    "planes over 2048 values": ((3, 17, 71, 67), "contiguous", True),
    "contiguous, few channels": ((3, 3, 131, 127), "contiguous", False),
    "channels_last, folded": ((4, 3, 113, 111), "channels_last", False),
    "channels_last, odd channels": ((4, 33, 37, 31), "channels_last", False),
    "channels_last, many": ((6, 64, 29, 27), "channels_last", False),
    "channels_last, few": ((8, 520, 7, 7), "channels_last", True),
    "vectors, many": ((20011, 12), "channels_last", False),
    "vectors, few": ((131, 1030), "channels_last", True),
}


def tensor(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers in the shape and layout of that name; the plan is what the name says."""
    shape, layout, fused = WAYS[name]
    x = torch.randn(shape, dtype=dtype) * 2 + 3
    if layout == "channels_last" and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    assert channel_passes.layout_of(x) == layout
    cut = channel_passes.plan(shape, layout, x.element_size())
    assert (cut.layout, cut.fused) == (layout, fused), "this shape goes another way now; choose one that does not"
    return x
