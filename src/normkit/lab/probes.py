"""Look into a network while it is trained, without changing the training.

Everything is measured on a copy: parameters, buffers and modes of the trained network are never touched, and what the
copy draws (dropout, say) is taken from a fork of torch's random numbers.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["drift", "input_moments", "probe", "recorded", "retaken"]

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


@contextmanager
def retaken(model: Module, images: Tensor, batch_size: int, *, dropout: bool = False) -> Iterator[Module]:
    """Give a copy whose stored statistics are taken again: the plain average over batches, with the weights held.

    The statistics are those of a net without its dropout, or of the net in training. The copy is in evaluation mode.

    >>> model = nn.BatchNorm1d(1)
    >>> with retaken(model, torch.tensor([[1.0], [3.0]]), batch_size=2) as copied:
    ...     copied.running_mean
    tensor([2.])
    """
    with probe(model) as copied, torch.no_grad():
        copied.train()
        for module in copied.modules():
            if isinstance(module, nn.Dropout):
                module.p = module.p if dropout else 0.0
            elif isinstance(getattr(module, "num_batches_tracked", None), Tensor):
                module.reset_running_stats()  # type: ignore[operator]
                module.momentum = None  # type: ignore[assignment]
        for start in range(0, len(images) - batch_size + 1, batch_size):
            copied(images[start : start + batch_size])
        yield copied.eval()


Moments = Mapping[str, tuple[Tensor, Tensor]]


def input_moments(model: nn.Module, names: Sequence[str], images: Tensor) -> Moments:
    """Return mean and standard deviation of what the modules of these names take in, per channel, in training mode."""
    with probe(model) as copied, recorded(copied, names) as seen, torch.no_grad():
        copied.train()
        copied(images)
    moments = {}
    for name in names:
        x = seen[name][0].double().transpose(0, 1).flatten(1)
        moments[name] = (x.mean(1), x.std(1, correction=0))
    return moments


def drift(before: Moments, after: Moments) -> tuple[list[float], list[float]]:
    """Return how far each module's input has moved in mean and in deviation, in units of its deviation before.

    ``sqrt(mean((m' - m)^2)) / sqrt(mean(s^2))`` over channels, and the same of ``s' - s``. A channel that does not vary
    weighs nothing in the unit, and needs no exception.

    >>> still = {"x": (torch.tensor([0.0, 0.0]), torch.tensor([2.0, 2.0]))}
    >>> drift(still, {"x": (torch.tensor([1.0, -1.0]), torch.tensor([2.0, 2.0]))})
    ([0.5], [0.0])
    """
    means, deviations = [], []
    for name, (mean, deviation) in before.items():
        unit = deviation.square().mean().sqrt().clamp_min(1e-12)
        means.append(float((after[name][0] - mean).square().mean().sqrt() / unit))
        deviations.append(float((after[name][1] - deviation).square().mean().sqrt() / unit))
    return means, deviations
