"""Torch's own thread pool, reached through its stable C interface.

libtorch_cpu exports ``torch_parallel_for(begin, end, grain, function, context)`` since torch 2.10. Through it a kernel
runs on the threads torch already has: there is no second pool, and ``torch.set_num_threads`` is obeyed.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import BackendError

__all__ = ["parallel_for", "unavailable"]

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


# The threads of a pool do not survive a fork, and waiting for them would never end: a child works alone.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


@functools.cache
def _function() -> Callable[..., int] | None:
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")
    for name in names:
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            function = getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)
            if function is not None:
                function.restype = ctypes.c_int32
                function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
            return function
    return None


def unavailable() -> str | None:
    """Return why torch's pool cannot be reached, or None where it can."""
    if _function() is None:
        return f"torch {torch.__version__} does not export torch_parallel_for; torch 2.10 does"
    return None


def parallel_for(tasks: int, grain: int, address: int, context: ctypes.Array[ctypes.c_int64]) -> None:
    """Run a kernel over tasks 0 to ``tasks``, at least ``grain`` to a thread, and return when all are done."""
    function = _function()
    if function is None:
        raise BackendError(f"the numba backend needs torch's thread pool: {unavailable()}")
    failed = function(0, tasks, tasks if _forked else grain, address, ctypes.addressof(context))
    if failed:
        raise RuntimeError(f"torch_parallel_for failed with code {failed}")
