"""The frozen form of a layer: same object, same state, a class in which ``train()`` does not reach the statistics.

A layer is frozen by giving the object a subclass of its own class. ``isinstance``, ``state_dict``, hooks, the optimizer
and every reference to the layer stay as they are, and its own forward still computes it; what changes is what that
forward reads when it asks ``self.training`` and ``self.track_running_stats``.

So a frozen layer still is what tools look for that handle batch normalization by class. Those that start statistics
again leave it as it is, with a warning; those that would take its statistics away, or put another layer in its place,
are refused. What writes into the tensors themselves cannot be kept out: `moved` tells of it afterwards.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ArgumentError, SurgeryError
from ..functional.first_runs import find_first_run, keep_first_run
from ..kernels.plain import channels as plain_channels
from ..kernels.repeated import is_repeated, may_be_repeated

__all__ = ["Frozen", "frozen_class", "is_frozen", "moved", "remember", "thaw"]

_STATISTICS = ("running_mean", "running_var", "running_covariance", "num_batches_tracked")
# Functions of torch that put a new layer in the place of every batch norm, and what they read of it first.
_CONVERT: Any = nn.SyncBatchNorm.convert_sync_batchnorm
_REPLACING = {_CONVERT.__func__.__code__: "nn.SyncBatchNorm.convert_sync_batchnorm"}


class Frozen(nn.Module):
    """Mixed into a layer's class by :func:`frozen_class`; holds the two switches of its statistics.

    Attributes:
        frozen_statistics: ``"running"`` normalizes with the stored statistics, ``"batch"`` with the batch's, whatever
            ``train()`` and ``eval()`` say.
        frozen_track: whether the stored statistics still move in a forward after ``train()``.
        frozen_parameters: the names of the parameters that were learning before.
        frozen_values: copies of what is held still, by which `moved` tells whether it was.
    """

    _thawed: ClassVar[type[nn.Module]]
    frozen_statistics: str
    frozen_track: bool
    frozen_parameters: tuple[str, ...]
    frozen_values: Mapping[str, Tensor] = {}
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
        if not tracks and self.__dict__.get("track_running_stats"):
            self._refuse("track_running_stats=False would take its running statistics out of use")
        self.__dict__["track_running_stats"] = tracks

    # No forward reads it, and it is the first thing that is looked at by what makes another layer out of this one.
    @property
    def affine(self) -> bool:
        """Whether the layer has weight and bias."""
        tool = _REPLACING.get(sys._getframe(1).f_code)
        if tool is not None:
            self._refuse(f"{tool} would put a layer in its place that is not")
        affine: bool = self.__dict__["affine"]
        return affine

    @affine.setter
    def affine(self, affine: bool) -> None:
        self.__dict__["affine"] = affine

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to exchange or take away the running statistics, but where a state is loaded."""
        if name in _STATISTICS and value is not self._buffers.get(name) and "frozen_loading" not in self.__dict__:
            self._refuse(f"{name} would be {'taken away' if value is None else 'exchanged'}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Refuse to take the running statistics away."""
        if name in _STATISTICS:
            self._refuse(f"{name} would be taken away")
        super().__delattr__(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Refuse to register running statistics again."""
        # torch also comes here to store a buffer again that was written in place.
        if name in _STATISTICS and tensor is not self._buffers.get(name) and "frozen_loading" not in self.__dict__:
            self._refuse(f"{name} would be exchanged")
        super().register_buffer(name, tensor, persistent)

    def reset_running_stats(self) -> None:
        """Start the statistics again where they may move; else warn."""
        if self.frozen_track:
            super().reset_running_stats()  # type: ignore[misc]  # of the layer's own class
        else:
            self._warn("reset_running_stats", "its running statistics stay")

    def reset_parameters(self) -> None:
        """Start again what may move; warn of what stays."""
        kept = [name for name, value in self.named_parameters(recurse=False) if not value.requires_grad]
        if not kept and self.frozen_track:
            super().reset_parameters()  # type: ignore[misc]  # of the layer's own class
            return
        before = {name: value.detach().clone() for name, value in self._held_tensors().items()}
        counter = self._buffers.get("num_batches_tracked")
        count = None if counter is None else counter.clone()
        # Of the layer's own class, which asks for reset_running_stats, and so warns.
        super().reset_parameters()  # type: ignore[misc]
        with torch.no_grad():
            for name, value in before.items():
                getattr(self, name).copy_(value)
            if counter is not None and count is not None and not self.frozen_track:
                counter.copy_(count)

    def _held_tensors(self) -> dict[str, Tensor]:
        """Return what is held still: the statistics, if they do not track, and parameters that do not learn."""
        statistics = () if self.frozen_track else _STATISTICS[:3]
        named = {name: self._buffers.get(name) for name in statistics}
        still = {name: value for name, value in self._parameters.items() if value is None or not value.requires_grad}
        return {name: value for name, value in (named | still).items() if value is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen":
        """Move or cast the layer, and the copies with it."""
        super()._apply(fn, recurse)
        self.frozen_values = {name: fn(value) for name, value in self.frozen_values.items()}
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take a state: that is what the layer is now frozen with."""
        self.__dict__["frozen_loading"] = True
        try:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        finally:
            del self.__dict__["frozen_loading"]
        remember(self)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse TorchScript, where train() would reach the statistics."""
        raise SurgeryError(
            f"{self._thawed.__name__} is frozen by normkit.freeze, which TorchScript cannot express; use torch.export, "
            "torch.jit.trace, or normkit.unfreeze(model) first"
        )

    def _refuse(self, what: str) -> NoReturn:
        raise SurgeryError(
            f"{self._thawed.__name__}({getattr(self, 'num_features', '')}) is frozen by normkit.freeze, and {what}; "
            "call normkit.unfreeze(model) before, and normkit.freeze(model) after it"
        )

    def _warn(self, call: str, what: str) -> None:
        warnings.warn(
            f"{call}: {self._thawed.__name__}({getattr(self, 'num_features', '')}) is frozen by normkit.freeze, and "
            f"{what}; call normkit.unfreeze(model) first to change them",
            stacklevel=3,
        )

    def forward(self, input: Tensor, *rest: Any) -> Tensor:
        """Normalize by the frozen switches; the shapes are the layer's own."""
        if self.frozen_statistics == "running" and self.frozen_track and self.__dict__["training"]:
            if rest and rest[0] is not None:
                said = f"{self._thawed.__name__} is frozen by normkit.freeze(track=True), which takes no mask"
                raise ArgumentError(f"{said}; freeze it without track, or leave it to train")
            return self._normalize_then_track(input)
        output: Tensor = super().forward(input, *rest)
        return output

    def _normalize_then_track(self, input: Tensor) -> Tensor:
        """Normalize with a copy of the statistics, since the update would spoil what backward needs of them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        repeated = not torch.compiler.is_compiling() and is_repeated()
        if repeated or (not torch.compiler.is_compiling() and may_be_repeated()):
            batch = plain_channels.statistics(input.detach())
            if repeated:
                mean, variance = find_first_run(self.running_mean, *batch, self.eps, self)
            else:
                keep_first_run(self.running_mean, *batch, (mean, variance))
        if not repeated:
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
        return _rebuild, (self._thawed,), self.__dict__


_CLASSES: dict[type, type[Frozen]] = {}


def frozen_class(base: type[Any]) -> type[Frozen]:
    """Return the frozen form of a layer class; the same object for the same class."""
    if base not in _CLASSES:
        members = {"__module__": base.__module__, "__doc__": base.__doc__, "_thawed": base}
        _CLASSES[base] = type(f"Frozen{base.__name__}", (Frozen, base), members)
    return _CLASSES[base]


def is_frozen(module: nn.Module) -> bool:
    """Say whether a layer was frozen by :func:`normkit.freeze`."""
    return isinstance(module, Frozen)


def remember(module: Frozen) -> None:
    """Take what the layer holds now for what it is frozen with."""
    module.frozen_values = {name: value.detach().clone() for name, value in module._held_tensors().items()}


def moved(module: nn.Module) -> tuple[str, ...]:
    """Return the names of what :func:`normkit.freeze` holds still and something has written to all the same."""
    if not isinstance(module, Frozen):
        return ()
    now = {**module._parameters, **module._buffers}
    return tuple(name for name, value in module.frozen_values.items() if not _is_equal(value, now.get(name)))


def _is_equal(kept: Tensor, now: Tensor | None) -> bool:
    if now is None or kept.shape != now.shape or kept.is_meta or now.is_meta:
        return now is not None and kept.shape == now.shape
    return torch.equal(kept.nan_to_num(), now.detach().to(kept).nan_to_num())


@contextmanager
def _own_class(module: nn.Module) -> Iterator[None]:
    """Give a frozen layer its own class back for a while."""
    frozen: Any = module.__class__
    module.__class__ = frozen._thawed
    try:
        yield
    finally:
        module.__class__ = frozen


def thaw(module: Frozen) -> None:
    """Give a frozen layer its own class back; its mode is what ``train()`` or ``eval()`` last asked for."""
    own: nn.Module = module
    if type(module) is not frozen_class(module._thawed):
        raise SurgeryError(
            f"the frozen {module._thawed.__name__} was made a {type(module).__name__} by another library since; undo "
            "that first (a parametrization: torch.nn.utils.parametrize.remove_parametrizations)"
        )
    thawed = module._thawed
    for name in ("frozen_statistics", "frozen_track", "frozen_parameters", "frozen_values"):
        vars(module).pop(name, None)
    own.__class__ = thawed


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = frozen_class(base)
    return cls.__new__(cls)
