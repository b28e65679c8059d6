"""Shapes that reach every way the CPU kernels cut their work, large enough for several threads."""

import torch
from torch import Tensor

from normkit.kernels import cpu_channels

# Name: shape, layout in memory, whether one task takes a channel from statistics to output.
WAYS = {
    "planes": ((8, 32, 29, 27), "planes", True),
    "planes, tiny": ((64, 128, 7, 7), "planes", True),
    "planes over 2048 values": ((3, 17, 71, 67), "planes", True),
    "planes, few channels": ((3, 3, 131, 127), "planes", False),
    "rows, folded": ((4, 3, 113, 111), "rows", False),
    "rows, odd channels": ((4, 33, 37, 31), "rows", False),
    "rows, many": ((6, 64, 29, 27), "rows", False),
    "rows, few": ((8, 520, 7, 7), "rows", True),
    "vectors, many": ((20011, 12), "rows", False),
    "vectors, few": ((131, 1030), "rows", True),
}


def tensor(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers in the shape and layout of that name; the plan is what the name says."""
    shape, layout, fused = WAYS[name]
    x = torch.randn(shape, dtype=dtype) * 2 + 3
    if layout == "rows" and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    assert cpu_channels.layout_of(x) == layout
    cut = cpu_channels.plan(shape, layout, x.element_size())
    assert (cut.layout, cut.fused) == (layout, fused), "this shape goes another way now; choose one that does not"
    return x
