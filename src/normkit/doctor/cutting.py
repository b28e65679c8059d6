"""An example cut into batches of another size."""

from typing import Any

import torch

from ..anatomy import iterate
from ..errors import ArgumentError

__all__ = ["cut"]

_NO_SAMPLES = "plan: the example holds no samples, it is {}; give some dozens and more, as training has them"


def cut(example: Any, size: int) -> Any:
    """Return batches of this many samples, where the example can be cut: a tensor, or batches of tensors or tuples.

    Raises:
        ArgumentError: there are no samples.

    >>> [len(batch) for batch in cut(torch.zeros(10, 3), 4)]
    [4, 4, 2]
    """
    if isinstance(example, torch.Tensor):
        if example.dim() == 0 or example.numel() == 0:
            raise ArgumentError(_NO_SAMPLES.format(f"a tensor of shape {tuple(example.shape)}"))
        return example.split(size) if len(example) >= size else example
    given = list(iterate(example))
    if not given:
        raise ArgumentError(_NO_SAMPLES.format("no batch"))
    if given and all(isinstance(batch, torch.Tensor) for batch in given):
        return cut(torch.cat(given), size)
    if given and all(isinstance(batch, tuple | list) and _is_flat(batch) for batch in given):
        columns = [torch.cat(column) for column in zip(*given, strict=True)]
        return list(zip(*(column.split(size) for column in columns), strict=True))
    return given


def _is_flat(batch: Any) -> bool:
    return all(isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == len(batch[0]) for value in batch)
