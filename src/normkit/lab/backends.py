"""Which implementation served the normalization layers of a cell, for its rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from ..anatomy import norm_layers
from ..kernels.dispatch import choose

__all__ = ["seen_backends"]

# A hook on every module slows a small network down, so it looks at the first calls only; no network of the laboratory
# has as many modules.
CALLS = 1000


@contextmanager
def seen_backends() -> Iterator[dict[str, str]]:
    """Fill a mapping from the classes of the normalization layers that are called to what computes them.

    ``"numba"``, ``"triton"`` or ``"plain"`` for normkit's layers, ``"torch"`` for torch's own. A call of a function
    without a layer is not seen.

    >>> import torch
    >>> with seen_backends() as seen, torch.no_grad():
    ...     _ = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))(torch.zeros(4, 2))
    >>> seen
    {'torch.nn.LayerNorm': 'torch'}
    """
    seen: dict[str, str] = {}
    others: set[type[nn.Module]] = set()
    calls = 0

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls >= CALLS:
            handle.remove()
        ours = not type(module).__module__.startswith("torch.")
        kind = f"{'' if ours else 'torch.nn.'}{type(module).__name__}"
        if kind in seen or type(module) in others or not inputs or not isinstance(inputs[0], Tensor):
            return
        # Looking takes longer than a small layer does: once for each class.
        if _is_norm(module):
            seen[kind] = _implementation(module, inputs[0]) if ours else "torch"
        else:
            others.add(type(module))

    handle = register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def _is_norm(module: nn.Module) -> bool:
    """Tell whether the module itself, not one within it, normalizes."""
    return any(layer.path == "" for layer in norm_layers(module))


def _implementation(module: nn.Module, x: Tensor) -> str:
    return choose(x) if isinstance(module, _BatchNorm) else "plain"
