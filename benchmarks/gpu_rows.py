"""Time the Triton kernels of layer, RMS, group and instance norm beside torch eager: ``python benchmarks/gpu_rows.py``.

Not yet run on a GPU: the kernels were tested through Triton's interpreter and compiled for compute capability 9.0, and
this command itself has only been seen to refuse a machine without one.

Every row is first compared with torch in float64, and a wrong kernel is not timed. Times are medians of CUDA events, in
microseconds; `copy` moves x to y once.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from gpu_channels import TYPES, error, laid_out, median
from torch import Tensor
from torch.nn import functional as F

from normkit.kernels.triton.samples import passes as triton_samples

EPS = 1e-5


@dataclass(frozen=True)
class Row:
    """One normalization of one shape; groups 0 stands for layer norm of the last dimension, -1 for RMS norm."""

    name: str
    shape: tuple[int, ...]
    groups: int = 0

    @property
    def centred(self) -> bool:
        """Whether the mean is removed."""
        return self.groups >= 0


IMAGES = {"56^2": (32, 256, 56, 56), "28^2": (32, 512, 28, 28), "7^2": (32, 2048, 7, 7), "3d": (2, 32, 96, 96, 96)}
ROWS = [
    *(Row(f"layer {rows} x {width}", (rows, width)) for width in (128, 1024, 4096, 8192) for rows in (32, 8192)),
    *(Row(f"RMS {rows} x {width}", (rows, width), -1) for width in (128, 1024, 4096, 8192) for rows in (32, 8192)),
    *(Row(f"group 32, {name}", shape, 32) for name, shape in IMAGES.items()),
    *(Row(f"instance, {name}", shape, shape[1]) for name, shape in IMAGES.items()),
    Row("one group, 56^2", IMAGES["56^2"], 1),
]


def ours(row: Row, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> list[Tensor]:
    """Output and gradients of the Triton kernels."""
    form = triton_samples.form_of(x, row.groups) if row.groups > 0 else triton_samples.form_of_rows(x, 1)
    assert form is not None
    y, saved = triton_samples.forward(x, form, weight, bias, EPS, row.centred, activation)
    found = triton_samples.backward(dy, x, form, weight, bias, saved, row.centred, activation)
    return [y, *(value for value in found[: 3 if row.centred else 2] if value is not None)]


def eager(row: Row, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> list[Tensor]:
    """Output and gradients of torch."""
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias) if value is not None]
    if row.groups > 0:
        y = F.group_norm(leaves[0], row.groups, *leaves[1:], eps=EPS)
    elif row.centred:
        y = F.layer_norm(leaves[0], x.shape[-1:], *leaves[1:], eps=EPS)
    else:
        y = F.rms_norm(leaves[0], x.shape[-1:], leaves[1], eps=EPS)
    if activation is not None:
        y = getattr(F, activation)(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def measure(row: Row, dtype: torch.dtype, layout: str, activation: str | None) -> bool:
    """Check one row and time it; tell whether it was right."""
    x, dy = (laid_out(torch.randn(row.shape, device="cuda", dtype=dtype), layout) for _ in range(2))
    channels = row.shape[1]
    weight = torch.randn(channels, device="cuda")
    bias = torch.randn(channels, device="cuda") if row.centred else None
    # The reference has no activation: at zero, one rounding would decide a whole gradient.
    wide = [None if value is None else value.double() for value in (x, dy, weight, bias)]
    wanted = eager(row, *wide, None)
    deviation = error(tuple(ours(row, x, dy, weight, bias, None)), tuple(wanted), dtype)
    del wanted, wide
    kind = str(dtype).removeprefix("torch.")
    label = f"{row.name:22s} {kind:9s} {layout:7s} {activation or '':5s}"
    if not deviation <= 1.0:
        print(f"{label} WRONG: {deviation:.3g} times what is allowed; not timed")
        return False
    # torch takes parameters of the input's type alone.
    theirs_weight = weight.to(dtype)
    theirs_bias = None if bias is None else bias.to(dtype)
    y = torch.empty_like(x)
    copy = median(lambda: y.copy_(x))
    mine = median(lambda: ours(row, x, dy, weight, bias, activation))
    theirs = median(lambda: eager(row, x, dy, theirs_weight, theirs_bias, activation))
    print(f"{label} ours {mine:9.1f}  torch {theirs:9.1f}  ratio {theirs / mine:5.2f}  copy {copy:9.1f}", flush=True)
    return True


def main() -> int:
    """Run every row that was asked for."""
    parser = argparse.ArgumentParser(description="Forward and backward of per-sample normalization on a GPU.")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--quick", action="store_true", help="every fourth row instead of all")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no CUDA GPU; tests/kernels runs the kernels through Triton's interpreter")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    right = True
    for row in ROWS[:: 4 if chosen.quick else 1]:
        assert math.prod(row.shape[2:]) > 1 or row.groups <= 0
        for kind in chosen.types:
            for layout in ("contiguous", "channels_last") if len(row.shape) > 2 else ("contiguous",):
                for activation in (None, "silu") if row.groups > 0 else (None,):
                    right &= measure(row, TYPES[kind], layout, activation)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
