"""An example in other sizes, of which the model decides which it takes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call
from ..anatomy.batches import tensors
from .outputs import mapped, outputs_of

__all__ = ["other_sizes", "second_size"]

# Elements that the doubled example may have to be tried first: of volumes doubling makes eight times as many.
_SMALL = 2**19


def other_sizes(model: nn.Module, example: Any, call: Call | None, *, most: int = 1) -> list[tuple[Any, str, Any]]:
    """Return the example in other sizes that the model takes, each with what was made of it, and the model's output.

    Tried in order: all spatial sizes doubled, halved, and two samples more; of a large example the doubled one comes
    last. The model decides.
    """
    found: list[tuple[Any, str, Any]] = []
    for other, words in _made_of(example):
        if len(found) == most:
            break
        try:
            output = outputs_of(model, other, call)
        except Exception:  # noqa: S112  whatever the model's code raises about a size it was not written for
            continue
        found.append((other, words, output))
    return found


def second_size(model: nn.Module, example: Any, call: Call | None) -> tuple[Any, str]:
    """Return the example in another size that the model takes, and what was made of it."""
    found = other_sizes(model, example, call)
    return found[0][:2] if found else (example, "the model takes no other size of it")


def _made_of(example: Any) -> Iterator[tuple[Any, str]]:
    given = list(tensors(example))
    if any(tensor.ndim > 2 for tensor in given):
        sizes = [(_doubled, "twice the size"), (_halved, "half the size")]
        large = sum(tensor.numel() * 2 ** max(tensor.ndim - 2, 0) for tensor in given) > _SMALL
        for change, words in sizes[::-1] if large else sizes:
            if large and change is _doubled:
                yield mapped(example, _longer), "two samples more"
            yield mapped(example, change), words
        if large:
            return
    yield mapped(example, _longer), "two samples more"


def _doubled(tensor: Tensor) -> Tensor:
    """Tile space by two, so that the values keep their range."""
    return tensor.repeat(1, 1, *(2 for _ in tensor.shape[2:])) if tensor.ndim > 2 else tensor


def _halved(tensor: Tensor) -> Tensor:
    if tensor.ndim <= 2:
        return tensor
    return tensor[(slice(None), slice(None), *(slice((size + 1) // 2) for size in tensor.shape[2:]))]


def _longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor.flip(0)[:1], tensor[:1]]) if tensor.ndim else tensor
