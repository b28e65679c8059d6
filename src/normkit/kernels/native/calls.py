"""The native calls, loaded at the first one. Each returns None for what it leaves to Python, which words refusals.

Each is None itself once it is known that there is no native part; callers look at it before they call.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import build

__all__ = ["batch_norm", "connect", "group_norm", "trailing_norm", "unavailable"]

Call = Callable[..., Tensor | None]

_backwards: dict[str, Callable[..., Any]] = {}
_reason: str | None = None


def connect(family: str, backward: Callable[..., Any]) -> None:
    """Say which function computes gradients of a family, "channels" or "samples", that are not the kernels' to give."""
    _backwards[family] = backward


def unavailable() -> str | None:
    """Return why calls are not native, or None where they are."""
    if batch_norm is _first_batch_norm:
        _load()
    return _reason


def _load() -> None:
    global batch_norm, trailing_norm, group_norm, _reason
    module = None
    try:
        module = build.load()
        if module is not None:
            from .programs import plan_channels, plan_samples

            module.configure(plan_channels, plan_samples, _backwards["channels"], _backwards["samples"])
    except (ImportError, OSError) as error:
        module, _reason = None, f"the native part could not be loaded: {error}"
    if module is None:
        batch_norm = trailing_norm = group_norm = None
        _reason = _reason or build.not_loaded()
    else:
        batch_norm, trailing_norm, group_norm = module.batch_norm, module.trailing_norm, module.group_norm


def _first_batch_norm(*arguments: Any) -> Tensor | None:
    _load()
    return None if batch_norm is None else batch_norm(*arguments)


def _first_trailing_norm(*arguments: Any) -> Tensor | None:
    _load()
    return None if trailing_norm is None else trailing_norm(*arguments)


def _first_group_norm(*arguments: Any) -> Tensor | None:
    _load()
    return None if group_norm is None else group_norm(*arguments)


batch_norm: Call | None = _first_batch_norm
trailing_norm: Call | None = _first_trailing_norm
group_norm: Call | None = _first_group_norm
