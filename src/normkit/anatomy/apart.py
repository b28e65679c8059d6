"""Run a model in one process of many, as if there were no others."""

import types
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..functional.exchange import alone

__all__ = ["without_exchange"]


@contextmanager
def without_exchange(model: nn.Module) -> Iterator[None]:
    """Let synchronized layers, torch's too, normalize inside with the batch of this process, and wait for no other.

    What looks at a model runs it on data of its own, of which other processes may have more or less, or none.

    >>> model = nn.SyncBatchNorm(2)
    >>> with without_exchange(model):
    ...     "forward" in vars(model)
    True
    >>> "forward" in vars(model)
    False
    """
    local = nn.modules.batchnorm._BatchNorm.forward
    of_torch = [
        module
        for module in model.modules()
        if type(module).forward is nn.SyncBatchNorm.forward and "forward" not in vars(module)
    ]
    for module in of_torch:
        vars(module)["forward"] = types.MethodType(local, module)
    try:
        with alone():
            yield
    finally:
        for module in of_torch:
            del vars(module)["forward"]
