"""What torch keeps for each thread by itself, carried from the thread that asks to those that compute for it."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..errors import ArgumentError

__all__ = ["refuse_modes", "surroundings"]


def surroundings() -> Callable[[], AbstractContextManager[None]]:
    """Return what, entered in another thread, makes it compute as this one does now.

    Carried are: whether gradients are recorded, autocast, the hooks on saved tensors, and torch's function modes, such
    as a default device. Context variables are the thread's own to copy.

    >>> import threading
    >>> seen = []
    >>> with torch.no_grad():
    ...     enter = surroundings()
    >>> def work():
    ...     with enter():
    ...         seen.append(torch.is_grad_enabled())
    >>> thread = threading.Thread(target=work)
    >>> thread.start(), thread.join(), seen
    (None, None, [False])
    """
    recorded = torch.is_grad_enabled()
    # A device type that this build does not have knows no autocast.
    types = [kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)]
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in types]
    cached = torch.is_autocast_cache_enabled()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    modes = torch.overrides._get_current_function_mode_stack()

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(recorded))
            for kind, dtype, enabled in casts:
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype, cache_enabled=cached))
            if hooks is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*hooks[:2]))
            for mode in modes:
                stack.enter_context(mode)
            yield

    return enter


def copied_context() -> Callable[..., Any]:
    """Return a function that calls another with the context variables of now, as often as once in each thread."""
    context = contextvars.copy_context()
    return lambda function, *args: context.copy().run(function, *args)


def refuse_modes(what: str) -> None:
    """Refuse where every operation must be seen by something that does not go from thread to thread.

    Raises:
        ArgumentError: a dispatch mode, a transform of ``torch.func`` or inference mode is active.
    """
    if torch._C._len_torch_dispatch_stack() > 0:
        said = "a torch dispatch mode is active (a counter of operations, fake tensors), which sees one thread only"
    elif torch._C._are_functorch_transforms_active():
        said = "a transform of torch.func is active, which sees one thread only"
    elif torch.is_inference_mode_enabled():
        said = "inference mode is active, in which no gradient can be computed"
    else:
        return
    raise ArgumentError(f"{what}: {said}; call it outside")
