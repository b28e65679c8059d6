"""Batch normalization that is no layer of the model, found while micro-batches compute."""

import contextlib
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from .. import functional
from ..errors import ArgumentError

__all__ = ["inside", "refused"]

# The modules of the model, while one of its micro-batches computes.
_KNOWN: contextvars.ContextVar[frozenset[nn.Module] | None] = contextvars.ContextVar("normkit_known", default=None)
# By the functions' owner: their names, and which of their arguments say that the batch's statistics are used.
_OURS = (
    "batch_norm",
    "sync_batch_norm",
    "ghost_batch_norm",
    "masked_batch_norm",
    "batch_renorm",
    "whitening_batch_norm",
)
_FUNCTIONS = (
    (torch, ("batch_norm",), "training", 5),
    (torch, ("instance_norm",), "use_input_stats", 5),
    (functional, _OURS, None, 0),
)
_lock = threading.Lock()
_watching = 0
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Look, inside, at all calls of layers and functions that normalize a batch.

    Functions are found by their names in torch and in :mod:`normkit.functional`, layers by a hook on
    every module's forward.
    """
    global _watching
    with _lock:
        if _watching == 0:
            _begin()
        _watching += 1
    try:
        yield
    finally:
        with _lock:
            _watching -= 1
            if _watching == 0:
                _undo.close()


def inside(model: nn.Module) -> Callable[[], None]:
    """Return what a micro-batch calls, in its own context, before it computes with the model."""
    known = frozenset(model.modules())

    def enter() -> None:
        _KNOWN.set(known)

    return enter


def _begin() -> None:
    hook = register_module_forward_pre_hook(_check_layer)
    _undo.callback(hook.remove)
    for owner, names, flag, place in _FUNCTIONS:
        for name in names:
            original = getattr(owner, name)
            setattr(owner, name, _checked(original, name, flag, place))
            _undo.callback(setattr, owner, name, original)


def _checked(function: Callable[..., Any], name: str, flag: str | None, place: int) -> Callable[..., Any]:
    signature = None if flag else inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        # A graph being compiled holds the function itself.
        if not torch.compiler.is_compiling() and _KNOWN.get() is not None:
            if signature is not None:
                uses = bool(signature.bind(*args, **kwargs).arguments.get("training"))
            else:
                uses = bool(args[place] if len(args) > place else kwargs.get(flag or ""))
                if name == "instance_norm":
                    uses = uses and (args[3] if len(args) > 3 else kwargs.get("running_mean")) is not None
            if uses:
                _refuse(
                    f"{name} is called as a function, on the statistics of the batch",
                    "put a layer into the model instead (nn.BatchNorm1d(C, affine=False, track_running_stats=False) "
                    "keeps nothing)",
                )
        return function(*args, **kwargs)

    return checked


def _check_layer(module: nn.Module, args: tuple[Any, ...]) -> None:
    if not isinstance(module, _NormBase):
        return
    known = _KNOWN.get()
    if known is None or module in known or getattr(module, "frozen_statistics", None) is not None:
        return
    stored = module.running_mean is not None
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        uses = module.training and stored
    else:
        uses = module.training or not stored
    if uses:
        _refuse(
            f"{type(module).__name__}({module.num_features}) is called in training mode and is no layer of the model "
            "that was given",
            "give all models as one, accumulate(nn.ModuleList([D, G]), ...), with a loss of such a pair; or put that "
            "model into eval()",
        )


def _refuse(said: str, instead: str) -> None:
    raise ArgumentError(f"accumulate: {said}: each micro-batch would have statistics of its own; {instead}")
