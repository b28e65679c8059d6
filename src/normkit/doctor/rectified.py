"""Whose output goes straight into an activation that is zero below zero: there a channel can die of its bias."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..anatomy import Call, run
from .probes import set_mode
from .subjects import Subject

__all__ = ["rectified_by_structure", "rectified_in_use"]

# Zero below zero, or so near to it that ten deviations below nothing is left.
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish)
_NAMES = frozenset({"relu", "relu6", "silu", "gelu", "mish", "hardswish"})


def rectified_by_structure(model: nn.Module, subjects: Sequence[Subject]) -> frozenset[str]:
    """Name the layers that bring such an activation, or stand before one in a ``Sequential``."""
    before = {
        id(first)
        for container in model.modules()
        if isinstance(container, nn.Sequential)
        for first, second in itertools.pairwise(container)
        if isinstance(second, _RECTIFIERS)
    }
    return frozenset(
        subject.name
        for subject in subjects
        if subject.layer is not None and (id(subject.layer.module) in before or _brings(subject.layer.tail))
    )


def _brings(tail: Sequence[nn.Module]) -> bool:
    return any(
        isinstance(part, _RECTIFIERS) or getattr(getattr(part, "function", None), "__name__", "") in _NAMES
        for part in tail
    )


def rectified_in_use(model: nn.Module, subjects: Sequence[Subject], batch: Any, call: Call | None) -> frozenset[str]:
    """Name the layers whose output, in evaluation, is given to such an activation as it is. The caller keeps the model.

    Tensors are followed by identity, so that neither a residual that is added nor a reshaping in between counts.
    """
    watched = _Rectifiers()
    handles = []
    for subject in subjects:
        assert subject.layer is not None

        def note(module: nn.Module, args: Any, output: Any, name: str = subject.name) -> None:
            if isinstance(output, Tensor):
                # Held, so that no other tensor gets its place meanwhile.
                watched.outputs[id(output)] = (name, output)

        handles.append(subject.layer.module.register_forward_hook(note))
    set_mode(model, training=False)
    try:
        with torch.no_grad(), watched:
            run(model, batch, call)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(watched.found)


class _Rectifiers(TorchFunctionMode):
    """Sees every call of torch's functions and keeps the layers whose outputs are rectified."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[str, Tensor]] = {}
        self.found: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at the name and the first argument, and let the call go on."""
        if args and getattr(func, "__name__", "").rstrip("_") in _NAMES and id(args[0]) in self.outputs:
            self.found.add(self.outputs[id(args[0])][0])
        return func(*args, **(kwargs or {}))
