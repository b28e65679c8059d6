"""Large pages for large outputs: touching fresh memory can cost more than the arithmetic."""

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

__all__ = ["THRESHOLD", "ask_for_large_pages"]

_MADV_HUGEPAGE = 14
_PAGE = 4096
THRESHOLD = 4 << 20  # bytes; below it the call costs as much as it saves


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def ask_for_large_pages(output: Tensor) -> None:
    """Ask the kernel to back a fresh tensor with large pages. It is advice: a refusal changes nothing."""
    size = output.nbytes
    if size < THRESHOLD:
        return
    madvise = _madvise()
    if madvise is not None:
        start = output.data_ptr()
        low, high = -(-start // _PAGE) * _PAGE, (start + size) // _PAGE * _PAGE
        madvise(low, high - low, _MADV_HUGEPAGE)
