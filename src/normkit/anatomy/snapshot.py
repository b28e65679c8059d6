"""Keep a model's whole state and put it back bit for bit."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .fingerprints import fingerprint, same_bits

__all__ = ["Snapshot", "fingerprint", "preserved"]


class Snapshot:
    """The state of a model at one moment.

    Kept are the values and identities of all parameters, buffers and gradients, ``requires_grad``, every attribute of
    every module (mode, momentum, eps, hooks, submodules, class; containers one level deep), and the states of the
    random generators of torch, CUDA where it runs, Python and NumPy.

    Args:
        model: the module to keep; its tensors are copied once.

    >>> norm = nn.BatchNorm1d(2)
    >>> before = Snapshot(norm)
    >>> norm(torch.tensor([[0.0, 1.0], [2.0, 5.0]])).shape, norm.running_mean
    (torch.Size([2, 2]), tensor([0.1000, 0.3000]))
    >>> before.restore()
    >>> norm.running_mean, norm.num_batches_tracked
    (tensor([0., 0.]), tensor(0))
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_ModuleState(module) for module in model.modules()]
        tensors = {id(tensor): tensor for module in model.modules() for tensor in _tensors_of(module)}
        self._tensors = [_TensorState(tensor) for tensor in tensors.values()]
        self._random = _random_states()

    def restore(self) -> None:
        """Put everything back."""
        for module in self._modules:
            module.restore()
        for tensor in self._tensors:
            tensor.restore()
        for put in self._random:
            put()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


@contextmanager
def preserved(model: nn.Module) -> Iterator[Snapshot]:
    """Run a block that leaves the model as it was: its state is put back at the end and on any exception.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> before = fingerprint(model)
    >>> with preserved(model):
    ...     output = model.train()(torch.randn(4, 2)).sum().backward()
    >>> fingerprint(model) == before
    True
    """
    with Snapshot(model) as state:
        yield state


class _ModuleState:
    """One module's class and attributes; of containers the contents too, so that the same dict is filled again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cls = type(module)
        self.attributes = dict(vars(module))
        self.contents = {name: _copy_of(value) for name, value in vars(module).items() if _is_container(value)}

    def restore(self) -> None:
        self.module.__class__ = self.cls
        own = vars(self.module)
        own.clear()
        own.update(self.attributes)
        for name, content in self.contents.items():
            _refill(own[name], content)


class _TensorState:
    """One tensor's memory, values, gradient and flags."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.is_lazy = is_lazy(tensor)
        self.cls = type(tensor)
        if self.is_lazy:
            return
        self.memory = tensor.detach()
        self.values = self.memory.clone()
        self.requires_grad = tensor.requires_grad
        self.hooks = dict(tensor._backward_hooks) if tensor._backward_hooks else {}
        self.grad = tensor.grad if tensor.is_leaf else None
        self.grad_values = None if self.grad is None else self.grad.detach().clone()

    def restore(self) -> None:
        if self.is_lazy:
            self._empty()
            return
        if self.tensor.data_ptr() != self.memory.data_ptr() or not _same_form(self.tensor, self.memory):
            self.tensor.data = self.memory
        _write(self.memory, self.values)
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.requires_grad)
            if self.tensor.grad is not self.grad:  # a tensor cast with a gradient of its old type refuses even its own
                self.tensor.grad = self.grad
            if self.grad is not None and self.grad_values is not None:
                _write(self.grad.detach(), self.grad_values)
        if self.tensor._backward_hooks is not None:
            _refill(self.tensor._backward_hooks, self.hooks)

    def _empty(self) -> None:
        """Take the shape away again from a parameter that a first forward has given one."""
        if type(self.tensor) is not self.cls:
            self.tensor.data = torch.empty(0, device=self.tensor.device, dtype=self.tensor.dtype)
            self.tensor.grad = None
            self.tensor.__class__ = self.cls


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield a module's own parameters, buffers and plain tensor attributes."""
    for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        if isinstance(value, Tensor):
            yield value


def _same_form(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and first.stride() == second.stride()


def _write(memory: Tensor, values: Tensor) -> None:
    """Write only where bits differ: an untouched tensor keeps its version, and a pending backward stays possible."""
    if not same_bits(memory, values):
        with torch.inference_mode(memory.is_inference()), torch.no_grad():
            memory.copy_(values)


def _is_container(value: object) -> bool:
    return isinstance(value, dict | list | set)


def _copy_of(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else list(value)


def _refill(container: Any, content: Any) -> None:
    """Give a dict, list or set its old contents, as the same object."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _random_states() -> list[Callable[[], None]]:
    """Return the calls that put the random generators back to where they are now."""
    kept, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    calls: list[Callable[[], None]] = [
        lambda: torch.set_rng_state(kept),
        lambda: random.setstate(python),
        lambda: np.random.set_state(numpy),  # noqa: NPY002
    ]
    if torch.cuda.is_initialized():
        devices = torch.cuda.get_rng_state_all()
        calls.append(lambda: torch.cuda.set_rng_state_all(devices))
    return calls
