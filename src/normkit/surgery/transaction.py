"""All or nothing: on any exception a model is bit for bit what it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..anatomy import Snapshot

__all__ = ["restored_on_error"]


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put the model's whole state back if the block does not come to its end, whatever ends it.

    >>> norm = nn.BatchNorm1d(2)
    >>> try:
    ...     with restored_on_error(norm):
    ...         _ = norm.running_mean.fill_(3.0)
    ...         raise KeyboardInterrupt
    ... except KeyboardInterrupt:
    ...     print(norm.running_mean)
    tensor([0., 0.])
    """
    state = Snapshot(model)
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished:
            state.restore()
