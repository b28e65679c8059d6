"""Nested tensors, batches of samples of different sizes: normalized where every row is one of a dense tensor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from . import checks

__all__ = ["is_nested", "normalize_rows"]


def is_nested(x: object) -> bool:
    """Tell whether x is a nested tensor, of either layout."""
    return isinstance(x, Tensor) and x.is_nested


def normalize_rows(
    normalize: Callable[[Tensor], Tensor], x: Tensor, trailing: int, caller: nn.Module | None = None
) -> Tensor:
    """Normalize the last dimensions of a nested tensor, none of which may be of different sizes.

    Args:
        normalize: takes a dense tensor with the same last dimensions.
        x: of layout torch.jagged, which is normalized as one tensor, or torch.strided, part by part.
        trailing: how many dimensions are normalized.
        caller: the layer that errors should name.

    Raises:
        ShapeError: a normalized dimension is of different sizes.
    """
    # What a nested tensor has beyond a tensor's methods, torch leaves undeclared.
    jagged: Any = x
    ragged: int = jagged._ragged_idx if x.layout is torch.jagged else _last_irregular(x)
    if x.dim() - trailing <= ragged:
        said = f"dimension {ragged} of the nested input has another size in every sample, and would be normalized over"
        checks.refuse(ShapeError, f"{said}; normalize the dimensions behind it, or each of input.unbind()", caller)
    if x.layout is not torch.jagged:
        return torch.nested.as_nested_tensor([normalize(part) for part in x.unbind()])
    # The offsets are the input's own, so that the result has the input's sizes and can be added to it.
    y: Tensor = torch.nested.nested_tensor_from_jagged(
        normalize(x.values()), jagged.offsets(), jagged.lengths(), jagged_dim=ragged
    )
    return y


def _last_irregular(x: Tensor) -> int:
    """Return the last dimension whose size differs between the parts, or the dimension of the parts where none does."""
    shapes = {tuple(part.shape) for part in x.unbind()}
    differing = [axis for axis, sizes in enumerate(zip(*shapes, strict=True), 1) if len(set(sizes)) > 1]
    return max(differing, default=0)
