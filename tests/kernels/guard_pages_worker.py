"""Run every CPU kernel on tensors between pages that may not be touched: one byte too far ends the process.

Called by `test_guard_pages` in a process of its own, with an element type and where the tensors lie: ``after`` and
``before`` such a page, or ``free`` in malloc's memory. It prints a digest of every result. `memory_check` calls it too.
"""

import ctypes
import hashlib
import itertools
import mmap
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from normkit.kernels.numba.channels import launch as channel_launch
from normkit.kernels.numba.channels import passes as channel_passes
from normkit.kernels.numba.channels import step_calls
from normkit.kernels.numba.samples import passes as sample_passes

_PAGE = mmap.PAGESIZE
_held: list[mmap.mmap] = []
_digest = hashlib.sha256()
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_empty, _empty_like = torch.empty, torch.empty_like


def guarded(size: int, dtype: torch.dtype, at_end: bool) -> Tensor:
    """Return uninitialized numbers between two pages that may not be touched, against the second or the first."""
    nbytes = max(1, size) * dtype.itemsize
    pages = -(-nbytes // _PAGE)
    region = mmap.mmap(-1, (pages + 2) * _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for page in (start, start + (pages + 1) * _PAGE):
        if _libc.mprotect(page, _PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    _held.append(region)
    offset = _PAGE + (pages * _PAGE - nbytes if at_end else 0)
    numbers = torch.frombuffer(region, dtype=dtype, count=max(1, size), offset=offset)[:size]
    return numbers.fill_(torch.nan if dtype.is_floating_point else 0)


class Guard:
    """Every tensor that a kernel is handed lies between guard pages: inputs, outputs and working memory."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end

    def like(self, x: Tensor) -> Tensor:
        return guarded(x.numel(), x.dtype, self.at_end).as_strided(x.shape, x.stride())

    def fresh(self, *shape: object, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
        sizes = shape[0] if isinstance(shape[0], (tuple, list)) else shape
        total = 1
        for size in sizes:
            total *= size
        return guarded(total, dtype, self.at_end).view(*sizes)

    def keep(self, x: Tensor) -> Tensor:
        return self.like(x).copy_(x)

    def __enter__(self) -> None:
        torch.empty, torch.empty_like = self.fresh, self.like  # type: ignore[assignment]
        for module in (channel_passes, step_calls, sample_passes):
            module.empty_like = self.like

    def __exit__(self, *_: object) -> None:
        torch.empty, torch.empty_like = _empty, _empty_like


CHANNELS = {
    "one": (3, 1, 2), "two vectors": (37, 3), "few rows": (5, 67), "a tile": (9, 130), "fused": (4, 17, 5, 3),
    "few channels": (3, 3, 117, 113), "plane over a chunk": (2, 17, 53, 41), "one channel": (31, 1, 7),
    "groups": (19, 33, 3, 3), "folded": (1031, 6), "folded, few rows": (7, 5), "many rows": (600, 37),
}  # fmt: skip
GROUPS = {
    "rows": ((7, 33), 1), "one short": ((1, 5), 1), "runs": ((5, 1803), 3), "strips": ((71, 24), 2),
    "planes": ((3, 6, 5, 7), 3), "parts": ((2, 6, 173, 167), 1), "pieces": ((1, 2, 373, 367), 2),
    "each": ((3, 7, 3, 5), 7), "columns": ((3, 24, 7, 5), 3), "folded": ((3, 6, 16, 12), 2),
    "columns in parts": ((2, 66, 61, 37), 2),
}  # fmt: skip


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def run_channels(guard: Guard, dtype: torch.dtype) -> None:
    """Forward, inference, backward and steps, in both layouts, with and without a residual."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for shape, channels_last in itertools.product(CHANNELS.values(), (False, True)):
        x, dy, residual = (guard.keep(laid_out(torch.randn(shape).to(dtype), channels_last)) for _ in range(3))
        weight, bias, mean, var = (guard.keep(torch.rand(shape[1], dtype=wide) + 0.5) for _ in range(4))
        layout = channel_passes.layout_of(x)
        assert layout is not None
        with guard:
            for activation, added in ((None, None), ("silu", residual)) if dtype is torch.float32 else ((None, None),):
                ways = (activation, added)
                y, saved = channel_passes.forward(x, layout, weight, bias, mean, var, 0.1, 1e-5, True, *ways)
                judge(y)
                back = channel_passes.backward(dy, x, layout, weight, bias, saved, activation, added, added is not None)
                judge(*back[:3])
                y, saved = channel_passes.inference(x, layout, weight, bias, mean, var, 1e-5, *ways)
                judge(y)
                judge(*channel_passes.backward(dy, x, layout, weight, bias, saved, frozen=True)[:3])
            mean_of_batch, var_of_batch = step_calls.statistics(x)
            judge(mean_of_batch, var_of_batch)
            rstd = guard.keep((var_of_batch + 1e-5).rsqrt())
            judge(step_calls.apply(x, mean_of_batch, rstd, weight, bias))
            sums = step_calls.reduce(dy, x, mean_of_batch, rstd)
            judge(*sums, step_calls.apply_backward(dy, x, mean_of_batch, rstd, weight, sums, x.numel() // shape[1]))
        release()


def run_samples(guard: Guard, dtype: torch.dtype) -> None:
    """Forward and backward of groups, in every layout."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for (shape, groups), channels_last in itertools.product(GROUPS.values(), (False, True)):
        x, dy = (guard.keep(laid_out(torch.randn(shape).to(dtype), channels_last)) for _ in range(2))
        form = sample_passes.form_of(x, groups)
        assert form is not None
        weight, bias = (guard.keep(torch.rand(shape[1], dtype=wide) + 0.5) for _ in range(2))
        for affine, wanted in (((weight, bias), True), ((None, None), False)):
            sample_passes.constant.cache_clear()
            with guard:
                variance = guard.fresh(form.samples * groups, dtype=torch.float64)
                y, saved = sample_passes.forward(x, form, *affine, 1e-5, True, None, variance)
                judge(y, saved, variance)
                dx, dweight, dbias = sample_passes.backward(dy, x, form, *affine, saved, wanted=wanted)
                judge(dx, *([dweight, dbias] if wanted else []))
        release()


def judge(*results: Tensor | None) -> None:
    """Every element was written: uninitialized memory holds NaN."""
    for result in results:
        assert result is not None
        assert not result.isnan().any()
        _digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())


def release() -> None:
    """Let the addresses go that later tensors do not need; the maps are closed with what was made from them."""
    _held.clear()


class Free(Guard):
    """The same in memory from malloc, for MALLOC_PERTURB_ and valgrind."""

    def __init__(self) -> None:
        super().__init__(at_end=True)

    def like(self, x: Tensor) -> Tensor:
        return _empty_like(x)

    def fresh(self, *shape: object, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
        return _empty(*shape, dtype=dtype)  # type: ignore[call-overload,no-any-return]


MODES: dict[str, Callable[[], Guard]] = {
    "after": lambda: Guard(at_end=True),
    "before": lambda: Guard(at_end=False),
    "free": Free,
}


def longer(x: Tensor) -> Tensor:
    """Show a sample more than there is memory for."""
    memory = (ctypes.c_char * (x.nbytes + x[0].nbytes)).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).view(len(x) + 1, *x.shape[1:])


def overrun(guard: Guard) -> None:
    """Read past the end on purpose, to see that it would be told."""
    x = guard.keep(torch.randn(4, 3, 5))
    channel_passes.forward(longer(x), "contiguous", None, None, None, None, 0.1, 1e-5, True)


def overwrite(guard: Guard) -> None:
    """Write past the end on purpose."""
    x, out = torch.randn(5, 3, 5), guard.keep(torch.randn(4, 3, 5))
    channel_passes.forward(x, "contiguous", None, None, None, None, 0.1, 1e-5, True, out=longer(out))


if __name__ == "__main__":
    torch.manual_seed(0)
    elements, side = sys.argv[1:3]
    faults = {"overrun": overrun, "overwrite": overwrite}
    if side in faults:
        # Where no page is guarded valgrind tells of it.
        faults[side](MODES["free" if "valgrind" in os.environ.get("LD_PRELOAD", "") else "after"]())
    else:
        assert channel_launch.ELEMENTS
        for element in elements.split(","):
            run_channels(MODES[side](), getattr(torch, element))
            run_samples(MODES[side](), getattr(torch, element))
    sys.stdout.write(_digest.hexdigest())
