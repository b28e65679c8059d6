"""The native calls, loaded at the first one. Each returns None for what it leaves to Python, which words refusals.

Each is None itself once it is known that there is no native part; callers look at it before they call.
"""

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError
from .. import memory, threads
from . import build

__all__ = ["batch_norm", "connect", "group_norm", "trailing_norm", "unavailable", "watch"]

Call = Callable[..., Tensor | None]
Noted = Callable[[str, torch.dtype, str | None, bool], None]

_backwards: dict[str, Callable[..., Any]] = {}
_module: ModuleType | None = None
_reason: str | None = None
_lock = threading.RLock()  # planning may come back here, while the first call loads


def connect(family: str, backward: Callable[..., Any]) -> None:
    """Say which function computes gradients of a family, "channels" or "samples", that are not the kernels' to give."""
    _backwards[family] = backward


def unavailable() -> str | None:
    """Return why calls are not native, or None where they are."""
    _load()
    return _reason


def watch(noted: Noted | None) -> None:
    """Call a function with each kernel that the native part launches: name, element type, activation, residual.

    None ends it. Where there is no native part nothing is called.
    """
    _load()
    if _module is None:
        return
    from .programs import KERNELS

    _module.watch(None if noted is None else lambda address: noted(*KERNELS[address]))


def _load() -> None:
    global batch_norm, trailing_norm, group_norm, _module, _reason
    with _lock:
        if batch_norm is not _first_batch_norm:
            return
        try:
            module = _configured()
        except (ImportError, OSError, BackendError) as error:
            module, _reason = None, f"the native part could not be loaded: {error}"
        if module is None:
            batch_norm = trailing_norm = group_norm = None
            return
        _module = module
        batch_norm, trailing_norm, group_norm = module.batch_norm, module.trailing_norm, module.group_norm


def _configured() -> ModuleType | None:
    global _reason
    _reason = threads.unavailable()
    module = None if _reason else build.load()
    if module is None:
        _reason = _reason or build.not_loaded()
        return None
    from .programs import plan_channels, plan_samples

    backwards = (_backwards["channels"], _backwards["samples"])
    module.configure(plan_channels, plan_samples, *backwards, memory.grant, memory.KEPT_FROM_NATIVE)
    memory.lend_by(module)
    return module


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
