"""What the hosts of the Triton kernels share: sizes of tiles, parameters as kernels take them, who can be served."""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..layouts import readable

__all__ = ["ELEMENTS", "EXACT", "computed", "piece", "power", "unavailable"]

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)
# The kernels say themselves where a product and a sum are rounded once: the backward must compute what the forward did,
# bit for bit.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def power(size: int) -> int:
    """Return the power of two that holds this many."""
    return 1 << (size - 1).bit_length()


def piece(positions: int) -> int:
    """Return the piece of a plane that pads it least, a power of two; of equals the longest."""
    longest = min(1024, power(positions))
    runs = [1 << k for k in range(min(6, longest.bit_length() - 1), longest.bit_length())]
    return min(runs, key=lambda run: (-(-positions // run) * run, -run))


def computed(parameter: Tensor | None) -> Tensor | None:
    """Return a parameter in the type that kernels compute in."""
    return None if parameter is None else readable(parameter.detach().float().contiguous())


def unavailable(x: Tensor) -> str | None:
    """Say why Triton cannot serve this tensor, or None where it can."""
    if x.dtype not in ELEMENTS:
        return f"Triton kernels take float32, bfloat16 and float16, got {x.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with torch's CUDA builds for Linux"
    if not x.is_cuda and not _is_interpreted():
        return f"Triton kernels run on a CUDA GPU, got a tensor on {x.device}"
    return None


@functools.cache
def _is_interpreted() -> bool:
    import triton

    from . import tiles

    return not isinstance(tiles.channel, triton.runtime.JITFunction)
