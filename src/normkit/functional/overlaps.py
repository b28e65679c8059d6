"""Which tensors share memory, exactly: what is written must not be read, or written, through another name."""

from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["is_same_memory", "overlaps_itself", "share_memory"]


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Tell whether an element of one tensor shares a byte with one of another. Interleaved tensors do not."""
    if not (_has_memory(one) and _has_memory(other)) or one.device != other.device:
        return False
    (low, high), (start, stop) = _extent(one), _extent(other)
    return low < stop and start < high and bool(np.shares_memory(_laid(one), _laid(other)))


def overlaps_itself(x: Tensor) -> bool:
    """Tell whether two elements of a tensor share memory, as those of an expanded one do."""
    steps = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    reach = 0
    for stride, size in steps:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    places = reduce(np.add.outer, (stride * np.arange(size) for stride, size in steps))
    return int(np.unique(places).size) < places.size


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Tell whether every element of one tensor stands where the same element of the other does."""
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.is_neg() == other.is_neg()


def _has_memory(x: Tensor) -> bool:
    ordinary = (type(x) is Tensor or type(x) is nn.Parameter) and torch._C._has_storage(x)
    return ordinary and x.layout is torch.strided and x.numel() > 0 and x.data_ptr() != 0


def _extent(x: Tensor) -> tuple[int, int]:
    """The first byte of a tensor, and the one past its last."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()


def _laid(x: Tensor) -> Any:
    """An array that lies as a tensor does; NumPy is asked where its elements are, never what they are."""
    size = x.element_size()
    lies = {
        "version": 3,
        "shape": tuple(x.shape),
        "strides": tuple(size * stride for stride in x.stride()),
        "typestr": f"|V{size}",
        "data": (x.data_ptr(), True),
    }
    return np.asarray(type("Laid", (), {"__array_interface__": lies})())
