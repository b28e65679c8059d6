"""Time the Triton kernels against torch eager and a plain copy, on a GPU: ``python benchmarks/gpu_channels.py``.

Not yet run on a GPU: the kernels were tested through Triton's interpreter and compiled for compute capability 9.0, and
this command itself has only been seen to refuse a machine without one.

Every row is first compared with torch in float64, and a wrong kernel is not timed. Times are medians of CUDA events, in
microseconds; `copy` moves x to y once.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from normkit.kernels.triton.channels import passes as triton_channels

SHAPES = {
    "ResNet-50, 64 x 112^2": (32, 64, 112, 112),
    "ResNet-50, 64 x 56^2": (32, 64, 56, 56),
    "ResNet-50, 256 x 56^2": (32, 256, 56, 56),
    "ResNet-50, 512 x 28^2": (32, 512, 28, 28),
    "ResNet-50, 256 x 14^2": (32, 256, 14, 14),
    "ResNet-50, 2048 x 7^2": (32, 2048, 7, 7),
    "MobileNetV2, 24 x 56^2": (32, 24, 56, 56),
    "U-Net, 32 x 96^3": (2, 32, 96, 96, 96),
    "MLP, 1024": (1024, 1024),
    "MLP, 128": (65536, 128),
    "audio, 64 x 16000": (16, 64, 16000),
    "audio, 1 x 160000": (8, 1, 160000),
    "LeNet, 6 x 28^2": (256, 6, 28, 28),
    "edge, 65 x 17 x 19": (32, 65, 17, 19),
}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
EPS = 1e-5


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, contiguous or channels-last."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x


def ours(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, layout: str, activation: str | None
) -> tuple[Tensor, ...]:
    """Output and gradients of the Triton kernels."""
    y, saved = triton_channels.forward(x, layout, weight, bias, None, None, 0.1, EPS, True, activation)
    return y, *triton_channels.backward(dy, x, layout, weight, bias, saved, activation)[:3]


def eager(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> tuple[Tensor, ...]:
    """Output and gradients of torch."""
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, eps=EPS)
    if activation is not None:
        y = getattr(F, activation)(y)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """The largest deviation, in units of what is allowed; NaN where a result is one."""
    worst = 0.0
    for got, want in zip(found, wanted, strict=True):
        allowed = ALLOWED[dtype if got.dtype == dtype else torch.float32] * max(1.0, want.abs().max().item())
        deviation = (got.double() - want).abs().max().item() / allowed
        worst = deviation if deviation != deviation else max(worst, deviation)
    return worst


def median(work: Callable[[], object]) -> float:
    """Microseconds of one call."""
    from triton.testing import do_bench

    return 1000 * do_bench(work, warmup=50, rep=200, return_mode="median")


def measure(name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, activation: str | None) -> bool:
    """Check one row and time it; tell whether it was right."""
    x, dy = (laid_out(torch.randn(shape, device="cuda", dtype=dtype), layout) for _ in range(2))
    weight, bias = (torch.randn(shape[1], device="cuda") for _ in range(2))
    # The reference has no activation: at zero, one rounding would decide a whole gradient.
    wanted = eager(x.double(), dy.double(), weight.double(), bias.double(), None)
    deviation = error(ours(x, dy, weight, bias, layout, None), wanted, dtype)
    del wanted
    label = f"{name:24s} {str(dtype).removeprefix('torch.'):9s} {layout:7s} {activation or '':5s}"
    if not deviation <= 1.0:
        print(f"{label} WRONG: {deviation:.3g} times what is allowed; not timed")
        return False
    y = torch.empty_like(x)
    copy = median(lambda: y.copy_(x))
    mine = median(lambda: ours(x, dy, weight, bias, layout, activation))
    theirs = median(lambda: eager(x, dy, weight, bias, activation))
    print(f"{label} ours {mine:9.1f}  torch {theirs:9.1f}  ratio {theirs / mine:5.2f}  copy {copy:9.1f}", flush=True)
    return True


def main() -> int:
    """Run every row that was asked for."""
    parser = argparse.ArgumentParser(description="Forward and backward of batch normalization on a GPU.")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--quick", action="store_true", help="three shapes instead of all")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no CUDA GPU; tests/kernels runs the kernels through Triton's interpreter")
    if triton_channels.unavailable(torch.ones(1, device="cuda")) is not None:
        parser.error(str(triton_channels.unavailable(torch.ones(1, device="cuda"))))
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    right = True
    for name, shape in list(SHAPES.items())[: 3 if chosen.quick else None]:
        for kind in chosen.types:
            for layout in ("contiguous", "channels_last") if len(shape) > 2 else ("channels_last",):
                for activation in (None, "relu"):
                    right &= measure(name, shape, TYPES[kind], layout, activation)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
