"""Memory for outputs: touching fresh memory can cost more than the arithmetic.

A large output comes in large pages where the system grants them. When it is freed its memory is kept and lent to the
next output of its size: a training loop asks for the same sizes in every step. What is kept free is limited, and
`release` gives it back. The limit is one share of the memory that all processes of a user have together: see `shares`.

Where the native part is loaded its caching allocator lends (`native/kept.h`), of smaller outputs too, and asks here how
much it may keep.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..errors import ArgumentError
from .shares import Share

__all__ = ["KEPT_FROM", "KEPT_FROM_NATIVE", "VARIABLE", "empty_like", "grant", "kept", "lend_by", "release"]

_MADV_HUGEPAGE = 14
_PAGE = 4096
_LARGE_PAGE = 2 << 20
KEPT_FROM = 4 << 20  # bytes; below it the calls cost as much as they save
KEPT_FROM_NATIVE = 64 << 10  # bytes
_PATIENCE = 0.1  # seconds
_SHARE = 16  # a sixteenth of the memory is kept at most, where the variable does not say how much
_SCARCE = 16  # where less than a sixteenth of the machine's memory is available, nothing is kept
_MACHINE = Path("/proc/meminfo")

# Where Linux says what a container may use, in both versions of its control groups.
_CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

# How many megabytes all processes of a user may keep free together; 0 for none.
VARIABLE = "NORMKIT_KEPT_MEGABYTES"

_native: ModuleType | None = None


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialized tensor of the shape, type and layout of x, which is contiguous in some memory format.

    A large one lies in memory that may have served before. It is an ordinary tensor, but, like one that
    ``torch.from_numpy`` returns, its storage cannot be resized where there is no native part.
    """
    size = x.nbytes
    if _native is not None and _is_dense(x):
        made: Tensor = _native.empty_like(x)
        return made
    if size < KEPT_FROM or _is_filled() or not _is_dense(x):
        return torch.empty_like(x)
    _limit()  # a wrong setting is told here, where an error is heard
    block = _kept.take(-(-size // _LARGE_PAGE) * _LARGE_PAGE)
    lent = (ctypes.c_char * size).from_address(block.data_ptr())
    # The storage holds what it was made from; when that is gone no tensor sees the memory any more.
    lent.loan = _Loan(_kept, block)  # type: ignore[attr-defined]
    # In place, for it must be no view: autograd refuses to change a view in place that it did not make itself.
    return torch.frombuffer(lent, dtype=x.dtype).as_strided_(x.shape, x.stride())


def kept() -> int:
    """Return how many bytes are kept free for the next outputs."""
    return _kept.size() if _native is None else int(_native.kept())


def release() -> None:
    """Give all memory that is kept free back to the system."""
    if _native is not None:
        _native.release()
        _kept.tell(0)
    _kept.trim(0)


def lend_by(native: ModuleType) -> None:
    """Have the native part lend from here on."""
    global _native
    _native = native
    _kept.trim(0)


def grant(wished: int) -> int:
    """Return how much of the memory that the native part wishes to keep it may keep, and tell it to the others.

    Nothing is granted where the machine has little left.

    Args:
        wished: in bytes.

    Raises:
        ArgumentError: the variable is no number.
    """
    return _kept.grant(0 if _is_scarce() else _limit(), wished)


class _Kept:
    """Blocks of memory that no tensor uses, the one freed last at the end.

    A block comes back whenever its tensor dies, in any thread and in the middle of anything, also of a method of this
    class. So ``put`` does not wait: a block that cannot be sorted in at once lies in `_returned` until the next call.
    """

    def __init__(self, share: Share | None = None) -> None:
        self._share = Share("normkit-kept") if share is None else share
        self.begin_anew()

    def begin_anew(self) -> None:
        """Keep nothing yet: what a fork copied is its parent's, and so is a lock that another thread held there."""
        self._returned: deque[Tensor] = deque()
        self._blocks: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        lock = self._lock
        # Not for ever: the call may stand in the middle of another of this thread, in a garbage collection.
        if lock.acquire(timeout=_PATIENCE):
            try:
                self._sort_in()
                for place in range(len(self._blocks) - 1, -1, -1):
                    if self._blocks[place].nbytes == size:
                        # The others hear of it when the next block comes back: until then they count too much.
                        return self._blocks.pop(place)
            finally:
                lock.release()
        block = torch.empty(size, dtype=torch.uint8)
        _ask_for_large_pages(block)
        return block

    def put(self, block: Tensor) -> None:
        if _native is None:
            self._returned.append(block)
            self.trim(_limit())

    def grant(self, limit: int, wished: int) -> int:
        """Return how much another may keep in the place of this."""
        allowed = self._share.allowed(limit, wished)
        if allowed < wished:
            self._share.tell(allowed)
        return min(allowed, wished)

    def tell(self, held: int) -> None:
        self._share.tell(held)

    def trim(self, limit: int) -> None:
        """Let go of the blocks that have been free longest until this process's part of ``limit`` bytes is left."""
        lock = self._lock
        if not lock.acquire(blocking=False):
            return
        try:
            self._sort_in()
            held = self.size()
            allowed = self._share.allowed(limit, held)
            if held > allowed:
                while self._blocks and held > allowed:
                    held -= self._blocks.pop(0).nbytes
                self._share.tell(held)
        finally:
            lock.release()

    def size(self) -> int:
        return sum(block.nbytes for block in (*self._blocks, *self._returned))

    def _sort_in(self) -> None:
        while self._returned:
            self._blocks.append(self._returned.popleft())


class _Loan:
    """A block that a tensor uses, until it dies."""

    __slots__ = ("block", "lender")

    def __init__(self, lender: _Kept, block: Tensor) -> None:
        self.lender, self.block = lender, block

    def __del__(self) -> None:
        self.lender.put(self.block)


_kept = _Kept()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _kept.begin_anew())


@functools.cache
def _limit() -> int:
    """Return how many bytes all processes of this user may keep free together."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        if not given.isdecimal():
            raise ArgumentError(f"{VARIABLE} must be a whole number of megabytes, 0 to keep none; got {given!r}")
        return int(given) << 20
    return _memory_of_the_process() // _SHARE


def _memory_of_the_process() -> int:
    """Return how many bytes this process may use: the machine's, or a container's share of them."""
    sizes = [16 << 30]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on every system
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
            sizes.append(int(file.read_text()))
    return min(sizes)


def _is_scarce() -> bool:
    """Say whether the machine has little memory left; where it does not say how much, it has enough."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        sizes = {line.partition(":")[0]: int(line.split()[1]) for line in _MACHINE.read_text().splitlines()[:5]}
        return sizes.get("MemAvailable", sizes["MemTotal"]) < sizes["MemTotal"] // _SCARCE
    return False


def _is_filled() -> bool:
    """Say whether torch has been asked to fill uninitialized memory, which shows what a kernel leaves unwritten."""
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return bool(fills and torch.are_deterministic_algorithms_enabled())


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _ask_for_large_pages(block: Tensor) -> None:
    """Ask the system to back fresh memory with large pages. It is advice: a refusal changes nothing."""
    madvise = _madvise()
    if madvise is not None:
        start = block.data_ptr()
        low, high = -(-start // _PAGE) * _PAGE, (start + block.nbytes) // _PAGE * _PAGE
        madvise(low, high - low, _MADV_HUGEPAGE)
