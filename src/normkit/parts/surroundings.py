"""What torch keeps for each thread by itself, carried from the thread that asks to those that compute for it."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import _pop_mode, _push_mode

from ..errors import ArgumentError

__all__ = ["Surroundings", "copied_context", "refuse_modes", "surroundings"]


def surroundings() -> Callable[[], AbstractContextManager[None]]:
    """Return what, entered in another thread, makes it compute as this one does now.

    Carried are: whether gradients are recorded, autocast, the hooks on saved tensors, torch's function modes, such as a
    default device, and the device and stream of CUDA. Context variables are the thread's own to copy.

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
    casts = _casts()
    cached = torch.is_autocast_cache_enabled()
    hooks = _hooks()
    modes = torch.overrides._get_current_function_mode_stack()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(recorded))
            for kind, dtype, enabled in casts:
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype, cache_enabled=cached))
            if hooks is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*hooks))
            for mode in modes:
                stack.enter_context(mode)
            if stream is not None:
                # Its device becomes the current one too.
                stack.enter_context(torch.cuda.stream(stream))
            yield

    return enter


def copied_context() -> Callable[..., Any]:
    """Return a function that calls another with the context variables of now, as often as once in each thread."""
    context = contextvars.copy_context()
    return lambda function, *args: context.copy().run(function, *args)


class Surroundings:
    """What torch keeps for this thread at this moment, to compute with again for a while, whatever has been set since.

    Beside what `surroundings` carries: dispatch modes, inference mode and whether forward mode is on.

    >>> callers = Surroundings()
    >>> with torch.no_grad():
    ...     with callers.again():
    ...         inside = torch.is_grad_enabled()
    ...     inside, torch.is_grad_enabled()
    (True, False)
    """

    def __init__(self) -> None:
        self._recorded, self._casts = torch.is_grad_enabled(), _casts()
        self._forward_mode = torch._C._is_fwd_grad_enabled()
        self._cached, self._hooks = torch.is_autocast_cache_enabled(), _hooks()
        self._without_hooks = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
        self._modes = torch._C._len_torch_function_stack()
        self._dispatch_modes = torch._C._len_torch_dispatch_stack()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self._keys = _keys()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Compute, inside, as it was when this object was made.

        Raises:
            ArgumentError: something is active that cannot be put aside, such as a transform of ``torch.func``.
        """
        with contextlib.ExitStack() as aside:
            # Modes see what follows: they go first, and come back last.
            while torch._C._len_torch_function_stack() > self._modes:
                aside.callback(torch._C._push_on_torch_function_stack, torch._C._pop_torch_function_stack())
            while torch._C._len_torch_dispatch_stack() > self._dispatch_modes:
                aside.callback(_push_mode, _pop_mode())
            if torch.is_inference_mode_enabled():
                aside.enter_context(torch._C._InferenceMode(False))
            if torch.is_grad_enabled() != self._recorded:
                aside.callback(torch._C._set_grad_enabled, torch.is_grad_enabled())
                torch._C._set_grad_enabled(self._recorded)
            if torch._C._is_fwd_grad_enabled() != self._forward_mode:
                aside.callback(torch._C._set_fwd_grad_enabled, torch._C._is_fwd_grad_enabled())
                torch._C._set_fwd_grad_enabled(self._forward_mode)
            self._put_casts_aside(aside)
            self._put_hooks_aside(aside)
            if self._stream is not None:
                stream = torch.cuda.current_stream()
                if stream != self._stream:
                    aside.callback(torch.cuda.set_stream, stream)
                    torch.cuda.set_stream(self._stream)
            if _keys() != self._keys:
                raise ArgumentError(
                    "a transform of torch.func, or another guard of torch's that holds for a whole thread, is active "
                    "around a norm that must wait for others here; call the norm outside of it"
                )
            yield

    def _put_casts_aside(self, aside: contextlib.ExitStack) -> None:
        now = _casts()
        if now != self._casts:
            aside.callback(_set_casts, now)
            _set_casts(self._casts)
        if torch.is_autocast_cache_enabled() != self._cached:
            aside.callback(torch.set_autocast_cache_enabled, not self._cached)
            torch.set_autocast_cache_enabled(self._cached)

    def _put_hooks_aside(self, aside: contextlib.ExitStack) -> None:
        without = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
        if without != self._without_hooks:
            aside.callback(_forbid_hooks, without)
            _forbid_hooks(self._without_hooks)
        while (hooks := _hooks()) is not None and hooks != self._hooks:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            aside.callback(torch._C._autograd._push_saved_tensors_default_hooks, *hooks)


_Cast = tuple[str, torch.dtype, bool]
_Hook = Callable[[Any], Any]


def _casts() -> list[_Cast]:
    """Return autocast of each type of device: to what, and whether."""
    return [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in _cast_devices()]


@functools.cache
def _cast_devices() -> tuple[str, ...]:
    # A device type that this build does not have knows no autocast.
    return tuple(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def _set_casts(casts: list[_Cast]) -> None:
    for kind, dtype, enabled in casts:
        torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_enabled(kind, enabled)


def _hooks() -> tuple[_Hook, _Hook] | None:
    """Return the innermost hooks on saved tensors."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[:2]


def _forbid_hooks(said: str | None) -> None:
    if said is None:
        torch._C._autograd._saved_tensors_hooks_enable()
    else:
        torch._C._autograd._saved_tensors_hooks_disable(said)


def _keys() -> tuple[int, int]:
    """Return what the dispatcher adds to and leaves out of every operation of this thread."""
    return torch._C._dispatch_tls_local_include_set().raw_repr(), torch._C._dispatch_tls_local_exclude_set().raw_repr()


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
