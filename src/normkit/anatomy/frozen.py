"""The frozen form of a layer: same object, same state, a class in which ``train()`` does not reach the statistics.

A layer is frozen by giving the object a subclass of its own class. ``isinstance``, ``state_dict``, hooks, the optimizer
and every reference to the layer stay as they are, and its own forward still computes it; what changes is what that
forward reads when it asks ``self.training`` and ``self.track_running_stats``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Frozen", "frozen_class", "is_frozen", "thaw"]


class Frozen(nn.Module):
    """Mixed into a layer's class by :func:`frozen_class`; holds the two switches of its statistics.

    Attributes:
        frozen_statistics: ``"running"`` normalizes with the stored statistics, ``"batch"`` with the batch's, whatever
            ``train()`` and ``eval()`` say.
        frozen_track: whether the stored statistics still move in a forward after ``train()``.
        frozen_parameters: the names of the parameters that were learning before.
    """

    frozen_statistics: str
    frozen_track: bool
    frozen_parameters: tuple[str, ...]
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float

    # A property of the class is asked before the object's own dict, where train() leaves its wish for unfreeze.
    @property
    def training(self) -> bool:
        """Which statistics the layer's forward is told to normalize with."""
        return self.frozen_statistics == "batch"

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode

    @property
    def track_running_stats(self) -> bool:
        """What the layer's forward is told of its buffers."""
        tracks: bool = self.__dict__["track_running_stats"]
        wished: bool = self.__dict__["training"]
        return tracks if self.frozen_statistics == "running" else tracks and self.frozen_track and wished

    @track_running_stats.setter
    def track_running_stats(self, tracks: bool) -> None:
        self.__dict__["track_running_stats"] = tracks

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by the frozen switches; the shapes are the layer's own."""
        if self.frozen_statistics == "running" and self.frozen_track and self.__dict__["training"]:
            return self._normalize_then_track(input)
        output: Tensor = super().forward(input)
        return output

    def _normalize_then_track(self, input: Tensor) -> Tensor:
        """Normalize with a copy of the statistics, since the update would spoil what backward needs of them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        with torch.no_grad(), _own_class(self):
            self.forward(input.detach())
        return functional.batch_norm(
            input, mean, variance, getattr(self, "weight", None), getattr(self, "bias", None), eps=self.eps
        )

    def extra_repr(self) -> str:
        """Add the switches to the layer's own line."""
        moving = "moving" if self.frozen_track else "still"
        learning = any(parameter.requires_grad for parameter in self.parameters(recurse=False))
        affine = "learning" if learning else "still"
        return f"{super().extra_repr()}, frozen: statistics={self.frozen_statistics}, buffers {moving}, affine {affine}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the class below, because the frozen one exists only in memory."""
        return _rebuild, (type(self).__mro__[2],), self.__dict__


_CLASSES: dict[type, type[Frozen]] = {}


def frozen_class(base: type[Any]) -> type[Frozen]:
    """Return the frozen form of a layer class; the same object for the same class."""
    if base not in _CLASSES:
        members = {"__module__": base.__module__, "__doc__": base.__doc__}
        _CLASSES[base] = type(f"Frozen{base.__name__}", (Frozen, base), members)
    return _CLASSES[base]


def is_frozen(module: nn.Module) -> bool:
    """Say whether a layer was frozen by :func:`normkit.freeze`."""
    return isinstance(module, Frozen)


@contextmanager
def _own_class(module: nn.Module) -> Iterator[None]:
    """Give a frozen layer its own class back for a while."""
    frozen = module.__class__
    module.__class__ = frozen.__mro__[2]
    try:
        yield
    finally:
        module.__class__ = frozen


def thaw(module: Frozen) -> None:
    """Give a frozen layer its own class back; its mode is what ``train()`` or ``eval()`` last asked for."""
    own: nn.Module = module
    del module.frozen_statistics, module.frozen_track, module.frozen_parameters
    own.__class__ = type(module).__mro__[2]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = frozen_class(base)
    return cls.__new__(cls)
