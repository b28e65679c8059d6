"""What docs/kernels.md says that a CPU kernel may assume, asserted where tests call kernels.

`assert_contract` puts itself between the call and the kernel: every tensor whose address is taken is looked at, and at
every launch the memory that is written lies apart from all other memory the kernel is handed.
"""

import ctypes
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normkit.kernels.numba import slots
from normkit.kernels.numba.channels import launch, step_calls
from normkit.kernels.numba.channels import passes as channel_passes
from normkit.kernels.numba.samples import passes as sample_passes

_TENSORS = range(slots.X, slots.WEIGHT)
_PARAMETERS = range(slots.WEIGHT, slots.MEAN)
_STATISTICS = (slots.MEAN, slots.RSTD)
_RUNNING = {slots.RUNNING_MEAN, slots.RUNNING_VAR}
# What the kernels write, by the end of their names; all else is read, or working memory of the call.
_WRITTEN: dict[str, set[int]] = {
    "forward": {slots.Y, *_STATISTICS, *_RUNNING},
    "finish": {*_STATISTICS, *_RUNNING},
    "stored": {*_STATISTICS},
    "apply": {slots.Y},
    "backward": {slots.DX, slots.DRESIDUAL, slots.DWEIGHT, slots.DBIAS},
    "finish_sums": {slots.DWEIGHT, slots.DBIAS},
    "apply_backward": {slots.DX, slots.DRESIDUAL},
    "total": {slots.WEIGHT, slots.BIAS},
    **{name: set() for name in ("partial", "given", "backward_partial", "given_sums")},
}
# An output may stand where its input stands, element by element.
_IN_PLACE = ({slots.Y, slots.X}, {slots.Y, slots.RESIDUAL})
_LINE = 64


def assert_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at every call of a CPU kernel from now on, until the patches are undone."""
    kernels: dict[int, tuple[str, torch.dtype]] = {}

    def note(find: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(find)
        def noted(name: str, dtype: torch.dtype, *rest: Any) -> int:
            address = find(name, dtype, *rest)
            kernels[address] = name, dtype
            return address

        return noted

    def look(launched: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(launched)
        def looked(tasks: int, grain: int, address: int, context: ctypes.Array[ctypes.c_int64]) -> None:
            assert_launch(*kernels[address], list(context[: slots.SIZE]))
            launched(tasks, grain, address, context)

        return looked

    def hold(addresses: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(addresses)
        def held(*tensors: Tensor | None) -> Any:
            found = addresses(*tensors)
            for tensor, place in zip(*found, strict=False):
                assert_readable(tensor, place)
            return found

        return held

    def take(pointer: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(pointer)
        def taken(tensor: Tensor | None) -> int:
            place = pointer(tensor)
            if place:  # else it is refused before the launch
                assert_readable(tensor, place)
            return place

        return taken

    monkeypatch.setattr(launch, "kernel", note(launch.kernel))
    monkeypatch.setattr(sample_passes, "kernel", note(sample_passes.kernel))
    for module in (launch, sample_passes):
        monkeypatch.setattr(module, "parallel_for", look(module.parallel_for))
    for module in (channel_passes, step_calls, sample_passes):
        monkeypatch.setattr(module, "addresses", hold(module.addresses))
        monkeypatch.setattr(module, "pointer", take(module.pointer))


def assert_readable(tensor: Tensor | None, place: int) -> None:
    """Memory at the address holds the values of the tensor, packed, as they are."""
    if tensor is None or tensor.numel() == 0:
        return
    assert type(tensor) in (Tensor, nn.Parameter), f"a kernel was handed a {type(tensor).__name__}"
    assert tensor.is_cpu, f"a kernel was handed memory of {tensor.device}"
    assert tensor.layout is torch.strided, f"a kernel was handed a tensor of layout {tensor.layout}"
    assert not tensor.is_neg(), "a kernel was handed a negative view, whose memory holds the other sign"
    assert not tensor.is_conj(), "a kernel was handed a conjugate view"
    assert not tensor._is_zerotensor(), "a kernel was handed a ZeroTensor, which has no memory"
    assert place == tensor.data_ptr() != 0, "a kernel was handed a tensor whose storage was freed"
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        assert size == 1 or stride == step, f"a kernel was handed strides {tensor.stride()} for {tuple(tensor.shape)}"
        step *= size
    end = tensor.storage_offset() + tensor.numel()
    assert end * tensor.element_size() <= tensor.untyped_storage().nbytes(), "a kernel was handed a storage too small"


def assert_launch(name: str, dtype: torch.dtype, context: list[int]) -> None:
    """What the kernel writes lies apart from all else, and begins at a line of the cache where it is streamed."""
    written = _WRITTEN[name.rpartition(".")[2]]
    wide = 8 if dtype is torch.float64 else 4
    channels = context[slots.CHANNELS]
    total = context[slots.OUTER] * channels * context[slots.INNER] * dtype.itemsize
    sizes = {
        **dict.fromkeys(_TENSORS, total),
        **dict.fromkeys(_PARAMETERS, channels * wide),
        # Those of a sample are as many as there are groups, at least one.
        **dict.fromkeys(_STATISTICS, 8 if name.startswith("samples.") else 8 * channels),
    }
    given = {slot: (context[slot], context[slot] + size) for slot, size in sizes.items() if context[slot]}
    for one, other in itertools.combinations(given, 2):
        if one not in written and other not in written:
            continue
        (start, end), (begin, stop) = given[one], given[other]
        together = {one, other} in _IN_PLACE and start == begin
        assert together or end <= begin or stop <= start, f"{name}: slots {one} and {other} share memory"
    if context[slots.STREAM]:
        for slot in written & {slots.Y, slots.DX, slots.DRESIDUAL}:
            assert context[slot] % _LINE == 0, f"{name}: slot {slot} is streamed across lines of the cache"
