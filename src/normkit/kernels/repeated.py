"""Whether a forward is run again by a backward, as activation checkpointing does: then statistics must not move twice.

A layer cannot tell by its own state: two forwards of one batch look alike. What tells is who calls. While a backward
runs, a forward that is called

- by ``torch.utils.checkpoint`` (either kind, nested ones too) or
- from the ``backward`` of an autograd function (checkpoints of other libraries, reversible networks, compiled graphs)

computes again what a forward computed before. One that is called from a hook of a tensor or module is a forward of
its own, and so is whatever runs inside :func:`first_forward`.
"""

import contextlib
import contextvars
import sys
from collections.abc import Iterator
from types import CodeType, FrameType

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward
from torch.utils import checkpoint

from ..torch_versions import FUNCTION_APPLY

__all__ = ["first_forward", "in_backward", "is_inside_function", "is_repeated", "may_be_repeated", "repeats_function"]

_IS_FIRST: contextvars.ContextVar[bool] = contextvars.ContextVar("normkit_first_forward", default=False)
_CHECKPOINT = checkpoint.__file__
# Where torch enters the backward of an autograd function, the forward of one, and its engine.
_BACKWARDS = {
    getattr(BackwardCFunction, name).__code__ for name in ("apply", "apply_boxed") if hasattr(BackwardCFunction, name)
}
_ENGINE = _engine_run_backward.__code__
_REENTRANT = checkpoint.CheckpointFunction.forward.__code__


def in_backward() -> bool:
    """Tell whether this thread is inside a backward; the cheap question that comes before the others."""
    return torch._C._current_graph_task_id() != -1


def is_repeated() -> bool:
    """Tell whether the forward that runs now is run again by a backward."""
    if torch._C._current_graph_task_id() == -1 or _IS_FIRST.get():
        return False
    return _repeating() is not None


def repeats_function() -> bool:
    """Tell whether what is run again is the forward of an autograd function, by its backward."""
    code = _repeating()
    return code is not None and code in _BACKWARDS


def _repeating() -> CodeType | None:
    """Return the code that runs a forward again, of the innermost frame that does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code in _BACKWARDS or (code.co_name == "unpack_hook" and code.co_filename == _CHECKPOINT):
            return code
        if code is _ENGINE:
            # Called by the engine and by no node of it: a hook.
            return None
        frame = frame.f_back
    return None


def is_inside_function() -> bool:
    """Tell whether this is inside the forward of an autograd function, as far as torch can be asked: 2.14 shows that
    of its own reentrant checkpointing only.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _REENTRANT or (FUNCTION_APPLY is not None and code is FUNCTION_APPLY):
            return True
        frame = frame.f_back
    return False


def may_be_repeated() -> bool:
    """Tell whether the forward that runs now is one that a backward may run again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if (
        hooks is not None
        and getattr(hooks[0], "__code__", None) is not None
        and hooks[0].__code__.co_filename == _CHECKPOINT
    ):
        return True
    if FUNCTION_APPLY is None and not torch.is_grad_enabled():
        # The forward of an autograd function runs without recording. So does other code, where it costs some memory.
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is FUNCTION_APPLY or code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def first_forward() -> Iterator[None]:
    """Let layers called inside count as run for the first time, so that their running statistics move.

    Everywhere but in the ``backward`` of an autograd function they do anyway. There a layer is taken to compute again
    what the function's forward computed, and moves nothing; a function whose backward calls a layer that its forward
    did not call says so with this.

    Example:
        >>> import torch, normkit
        >>> layer = normkit.BatchNorm1d(2)
        >>> class Late(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x.clone()
        ...     @staticmethod
        ...     def backward(ctx, dy):
        ...         with normkit.functional.first_forward():
        ...             return dy * layer(ctx.saved_tensors[0])
        >>> Late.apply(torch.randn(8, 2, requires_grad=True)).sum().backward()
        >>> layer.num_batches_tracked
        tensor(1)
    """
    token = _IS_FIRST.set(True)
    try:
        yield
    finally:
        _IS_FIRST.reset(token)
