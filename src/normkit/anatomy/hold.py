"""Run forwards that leave the running statistics alone."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .forms import NormForm
from .layers import norm_layers
from .select import Where

__all__ = ["hold_statistics", "is_held", "listening", "tell_of_update", "update_later"]

_held: Counter[int] = Counter()  # modules that write to copies just now, by identity
_Listener = Callable[[nn.Module, int], None]
_listeners: list[_Listener] = []


@contextmanager
def hold_statistics(model: nn.Module, where: Where = None) -> Iterator[None]:
    """Let every forward inside this block leave the running statistics as they are.

    Any forward in training mode moves them, whether gradients are recorded or not: a model summary, a search for a
    learning rate, a second view. Inside the block the layers compute as ever and write to copies. Under activation
    checkpointing normkit's layers move once by themselves; for a step to count once in torch's::

        checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), hold_statistics(block)))

    Args:
        model: its layers get their own buffers back at the end, also after an exception.
        where: which layers, as for ``norm_layers``; None takes all.

    Raises:
        ArgumentError: ``where`` takes nothing.

    >>> import torch
    >>> norm = nn.BatchNorm1d(2)
    >>> with hold_statistics(norm):
    ...     output = norm(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
    >>> norm.running_mean, norm.num_batches_tracked
    (tensor([0., 0.]), tensor(0))
    """
    kept: list[tuple[nn.Module, str, Tensor]] = []
    for layer in norm_layers(model, where):
        form = layer.form or NormForm()
        for name in (form.mean, form.var, form.counter):
            buffer = layer.module._buffers.get(name)
            if buffer is not None and not layer.lazy:
                kept.append((layer.module, name, buffer))
    # Copies and not a flag: the same tensors are saved for backward, which checkpointing insists on, and a layer of
    # any class is held.
    for module, name, buffer in kept:
        module._buffers[name] = buffer.clone()
        _held[id(module)] += 1
    try:
        yield
    finally:
        for module, name, buffer in reversed(kept):
            module._buffers[name] = buffer
            _held[id(module)] -= 1


def is_held(module: nn.Module) -> bool:
    """Say whether a layer writes to copies just now."""
    return _held[id(module)] > 0


@contextmanager
def update_later(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Say, for the block, that forwards of these layers write nothing: what they saw is written once, later.

    Who does so announces it then, by `tell_of_update`.
    """
    numbers = [id(module) for module in modules]
    _held.update(numbers)
    try:
        yield
    finally:
        _held.subtract(numbers)


def tell_of_update(module: nn.Module, values: int) -> None:
    """Tell those who listen that a layer's statistics have just been updated, by so many values per channel."""
    for listener in tuple(_listeners):
        listener(module, values)


@contextmanager
def listening(listener: _Listener) -> Iterator[None]:
    """Hear, inside the block, of updates that are made outside a forward."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
