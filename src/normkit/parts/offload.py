"""What autograd keeps for the backward, moved out of the way meanwhile: to the processor's memory, or to a file."""

import contextlib
import ctypes
import functools
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import ArgumentError
from ..kernels.memory import release
from ..spelling import alternatives

__all__ = ["Offload", "check_offload", "offloaded"]

Offload = Literal["cpu", "disk"]

# Below this many bytes a tensor stays where it is: a statistic, a parameter of a norm, a scalar.
_SMALLEST = 1 << 16
# After so many bytes have been moved, freed memory is given back.
_EVERY = 32 << 20


def check_offload(offload: object, tensors: Sequence[Tensor]) -> None:
    """Refuse a word that is no place, and a place where the tensors are already.

    Raises:
        ArgumentError: offload is none of None, "cpu" and "disk", or "cpu" for a model on the CPU.
    """
    if offload not in (None, "cpu", "disk"):
        raise ArgumentError(f"offload={offload!r}; {alternatives(offload, ('cpu', 'disk'))}, and None")
    if offload == "cpu" and all(tensor.is_cpu for tensor in tensors):
        raise ArgumentError("offload='cpu', and the model is on the CPU already; pass offload='disk', or None")


@contextlib.contextmanager
def offloaded(offload: Offload | None, stays: Sequence[Tensor]) -> Iterator[None]:
    """Move what autograd saves inside, and bring it back for the backward.

    Args:
        offload: where to; None for nowhere.
        stays: tensors that live anyway, such as parameters: they are not moved.
    """
    if offload is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        kept = {tensor.untyped_storage().data_ptr() for tensor in stays}
        place = _Host(kept) if offload == "cpu" else _File(kept, stack)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(place.pack, place.unpack))
        yield


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's function that gives back what is free in every thread's part of the heap; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


class _Host:
    """The memory of the processor, for a model on another device."""

    def __init__(self, stays: set[int]) -> None:
        self._stays = stays

    def pack(self, x: Tensor) -> Any:
        if x.is_cpu or x.nbytes < _SMALLEST or x.untyped_storage().data_ptr() in self._stays:
            return x
        host = torch.empty_like(x, device="cpu", requires_grad=False, pin_memory=torch.cuda.is_available())
        host.copy_(x.detach())
        return x.device, host

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        brought: Tensor = host.to(device, non_blocking=True)
        return brought


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor in the file: where, and what its bytes mean."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    order: tuple[int, ...]


class _File:
    """A file without a name, in the system's folder for temporary files; gone with the step, whatever happens to it.

    What comes back is mapped: the system reads its pages when they are used, and may drop them at any time.
    """

    def __init__(self, stays: set[int], stack: contextlib.ExitStack) -> None:
        self._stays = stays
        self._file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  the stack closes it
        self._end = self._moved = 0
        # An output that the next layer saves as its input is written once.
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, _Piece]] = {}

    def pack(self, x: Tensor) -> Any:
        storage = x.untyped_storage()
        ordinary = type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided and not x.is_conj()
        if not ordinary or x.nbytes < _SMALLEST or storage.data_ptr() in self._stays:
            return x
        key = (storage.data_ptr(), x.storage_offset(), x._version, x.dtype, tuple(x.shape), x.stride())
        known = self._known.get(key)
        if known is not None and not known[0].expired():
            return known[1]
        piece = self._write(x.detach())
        self._known[key] = (StorageWeakRef(storage), piece)
        return piece

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        piece: _Piece = packed
        self._count(piece.nbytes)
        mapped = mmap.mmap(self._file.fileno(), piece.nbytes, access=mmap.ACCESS_COPY, offset=piece.offset)
        flat = torch.frombuffer(mapped, dtype=piece.dtype)
        dense = flat.view([piece.shape[axis] for axis in piece.order])
        return dense.permute([piece.order.index(axis) for axis in range(len(piece.order))]).to(piece.device)

    def _count(self, nbytes: int) -> None:
        """Give freed memory back to the system now and then: what was moved out of the way would stay resident."""
        self._moved += nbytes
        if self._moved >= _EVERY:
            self._moved = 0
            release()
            trim = _malloc_trim()
            if trim is not None:
                trim(0)

    def _write(self, x: Tensor) -> _Piece:
        # In the order in which the values lie in memory, so that a memory format comes back as it was.
        strides = x.stride()
        order = tuple(sorted(range(x.dim()), key=lambda axis: (-strides[axis], axis)))
        dense = x.permute(order).contiguous().cpu()
        values: Any = dense.view(-1).view(torch.uint8).numpy()
        rest = memoryview(values)
        start = offset = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        while rest:
            written = os.pwrite(self._file.fileno(), rest, offset)
            offset, rest = offset + written, rest[written:]
        self._end = offset
        self._count(offset - start)
        return _Piece(start, offset - start, x.dtype, x.device, tuple(x.shape), order)
