"""Look into a network while it is trained, without changing the training.

Everything is measured on a copy: parameters, buffers and modes of the trained network are never touched, and what the
copy draws (dropout, say) is taken from a fork of torch's random numbers.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["probe", "recorded"]

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def probe(model: Module) -> Iterator[Module]:
    """Give a copy of the network to measure on, and restore torch's random numbers afterwards.

    >>> model = nn.BatchNorm1d(2)
    >>> with probe(model) as copied:
    ...     _ = copied(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> model.running_mean
    tensor([0., 0.])
    """
    devices = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield copy.deepcopy(model)


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record the input and the output of the modules of these names, each time they are called.

    The tensors are those of the network's graph, so that gradients can be asked of them.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0], output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
