"""Runs the Triton kernels in a process of its own: whether they are interpreted is read when Triton is imported.

``python triton_channels_worker.py run FILE DEVICE`` saves the results of every case, ``compile FILE`` what a compiler
without a GPU makes of every kernel.
"""

import contextlib
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from normkit.kernels.triton.channels import passes as triton_channels

OUTPUT_DECIDES = ("relu", "relu6", "leaky_relu")
# Small enough that a small tensor has several shares of several tiles.
SMALL_CUT = {"_WHOLE": 512, "_TILE": 256, "_SPLITS": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the forward and the backward."""

    name: str
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype = torch.float32
    activation: str | None = None
    residual: bool = False
    stored: bool = False
    affine: bool = True
    location: float = 0.0
    small_cut: bool = False
    in_place: bool = False

    def inputs(self) -> dict[str, Tensor | None]:
        """The tensors of this case, the same in every process."""
        generator = torch.Generator().manual_seed(len(self.name) + 7 * sum(self.shape))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        channels = self.shape[1]
        x = random(*self.shape) * 2 + self.location
        if self.name.startswith("troubled"):
            trouble(x)
        tensors = {"x": x, "dy": random(*self.shape), "residual": random(*self.shape) if self.residual else None}
        laid = {name: self.laid_out(value) for name, value in tensors.items()}
        return laid | {
            "weight": random(channels) if self.affine else None,
            "bias": random(channels) if self.affine else None,
            "running_mean": random(channels),
            "running_var": random(channels).square() + 0.5,
        }

    def laid_out(self, value: Tensor | None) -> Tensor | None:
        """The same in this case's layout and type."""
        if value is None:
            return None
        value = value.to(self.dtype)
        return (
            value.movedim(1, -1).contiguous().movedim(-1, 1) if self.layout == "channels_last" else value.contiguous()
        )


def trouble(x: Tensor) -> None:
    """Make channel 1 constant and huge, put a NaN into channel 2, and scale channel 3 to where squares overflow."""
    x[:, 1] = 1e10
    x[0, 2].view(-1)[1] = torch.nan
    x[:, 3] *= 1e30


PLANES = "contiguous"
ROWS = "channels_last"
CASES = [
    Case("one tile", (7, 5, 3), PLANES, affine=False),
    Case("one tile", (7, 5, 3), ROWS, affine=False),
    Case("half precision", (4, 3, 7, 7), PLANES, torch.bfloat16, "silu", residual=True),
    Case("half precision", (4, 3, 7, 7), ROWS, torch.float16, "relu6", residual=True),
    Case("five dimensions", (3, 2, 5, 3, 3), PLANES, activation="relu"),
    Case("five dimensions", (3, 2, 5, 3, 3), ROWS, torch.bfloat16, activation="silu"),
    Case("two dimensions", (33, 17), ROWS, activation="leaky_relu", residual=True),
    Case("two values", (2, 3, 1), PLANES),
    Case("shares", (3, 2, 16, 13), PLANES, activation="relu", residual=True, small_cut=True),
    Case("shares", (3, 2, 16, 13), ROWS, activation="relu6", residual=True, small_cut=True),
    Case("shares of halves", (2, 1, 17, 19), PLANES, torch.float16, "relu6", small_cut=True),
    Case("shares of halves", (2, 3, 17, 19), ROWS, torch.bfloat16, "silu", residual=True, small_cut=True),
    Case("tiles as they are cut", (2, 1, 97, 89), PLANES),
    Case("tiles as they are cut", (1031, 3), ROWS, residual=True),
    Case("stored", (4, 3, 7, 7), PLANES, activation="leaky_relu", residual=True, stored=True),
    Case("stored", (4, 3, 7, 7), ROWS, torch.float16, stored=True, affine=False),
    Case(
        "stored in shares", (3, 2, 16, 13), PLANES, torch.bfloat16, "relu", residual=True, stored=True, small_cut=True
    ),
    Case("stored in shares", (3, 2, 16, 13), ROWS, activation="silu", stored=True, small_cut=True),
    Case("in place", (4, 3, 7, 7), PLANES, activation="relu", in_place=True),
    Case("in place", (3, 2, 16, 13), ROWS, small_cut=True, in_place=True),
    Case("far from zero", (4, 3, 7, 7), PLANES, location=2e4),
    Case("far from zero", (4, 3, 7, 7), ROWS, location=2e4),
    Case("far from zero in shares", (3, 2, 16, 13), PLANES, location=2e4, small_cut=True),
    Case("far from zero in shares", (3, 2, 16, 13), ROWS, location=2e4, small_cut=True),
    Case("troubled", (4, 4, 7, 7), PLANES),
    Case("troubled", (4, 4, 7, 7), ROWS),
    Case("troubled in shares", (3, 4, 16, 13), PLANES, small_cut=True),
    Case("troubled in shares", (3, 4, 16, 13), ROWS, small_cut=True),
]


def run(case: Case, device: str) -> dict[str, Tensor | None]:
    """What forward or inference, and then backward, make of a case."""
    given = {name: None if value is None else value.to(device) for name, value in case.inputs().items()}
    x, dy, residual, weight, bias, running_mean, running_var = given.values()
    assert triton_channels.unavailable(x) is None
    used = x.clone() if case.in_place else x
    shared = {"activation": case.activation, "residual": residual, "out": used if case.in_place else None}
    if case.stored:
        y, saved = triton_channels.inference(used, case.layout, weight, bias, running_mean, running_var, 1e-5, **shared)
    else:
        running = (running_mean, running_var, 0.1, 1e-5, True)
        y, saved = triton_channels.forward(used, case.layout, weight, bias, *running, **shared)
    assert not case.in_place or y.data_ptr() == used.data_ptr()
    other = None
    if case.residual and case.activation is not None:
        other = y if case.activation in OUTPUT_DECIDES else residual
    dx, dweight, dbias, dresidual = triton_channels.backward(
        dy, x, case.layout, weight, bias, saved, case.activation, other, case.residual, case.stored
    )
    found = {"y": y, "saved": saved, "running_mean": running_mean, "running_var": running_var}
    found |= {"dx": dx, "dweight": dweight, "dbias": dbias, "dresidual": dresidual}
    found["shares"] = torch.tensor(triton_channels.plan(tuple(x.shape), case.layout).splits)
    return {name: None if value is None else value.cpu() for name, value in found.items()}


def run_all(device: str) -> list[dict[str, Tensor | None]]:
    """The results of every case, in memory that starts as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    results = []
    for case in CASES:
        triton_channels.plan.cache_clear()
        with mock.patch.dict(vars(triton_channels), SMALL_CUT if case.small_cut else {}):
            results.append(run(case, device))
    return results


class Compiler:
    """Stands in for a kernel: a launch compiles it for a GPU that need not be there, and notes what came out."""

    made: dict[str, dict[str, Any]] = {}  # noqa: RUF012  one table for all kernels

    def __init__(self, kernel: Any, layout: str) -> None:
        self.kernel = kernel
        self.layout = layout

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *given: Any, num_warps: int = 4, enable_fp_fusion: bool = True, **settings: Any) -> None:
        """Compile for compute capability 9.0, as the launch would."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
        kinds, constants, aligned = {}, dict(settings), {}
        for place, (parameter, value) in enumerate(zip(self.kernel.params, given, strict=False)):
            if value is None or (isinstance(value, int) and value == 1):
                constants[parameter.name] = value
            elif isinstance(value, Tensor):
                kinds[parameter.name] = names[value.dtype]
            else:
                kinds[parameter.name] = parameter.annotation_type or "i32"
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                aligned[place,] = [["tt.divisibility", 16]]
        signature = {name: kinds.get(name, "constexpr") for name in self.kernel.arg_names}
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        source = ASTSource(self.kernel, signature, constants, aligned)
        made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.made[f"{self.layout} {self.kernel.__name__}"] = {"ptx": made.asm["ptx"], "bytes": len(made.asm["cubin"])}


def compile_all() -> dict[str, dict[str, Any]]:
    """Every kernel, by layout and name."""
    from normkit.kernels.triton.channels import (
        backward as channel_backward,
    )
    from normkit.kernels.triton.channels import (
        forward as channel_forward,
    )
    from normkit.kernels.triton.channels import (
        steps as channel_steps,
    )

    steps = [(channel_forward, ("forward", "partial", "apply")), (channel_steps, ("finish", "finish_sums"))]
    launched = [*steps, (channel_backward, ("backward", "backward_partial", "apply_backward"))]
    whole = [((8, 32, 14, 14), PLANES, torch.float32), ((64, 32), ROWS, torch.float32)]
    shapes = [*whole, ((32, 64, 56, 56), PLANES, torch.bfloat16), ((25088, 64), ROWS, torch.bfloat16)]
    for shape, layout, dtype in shapes:
        x, parameter = torch.empty(shape, dtype=dtype), torch.ones(shape[1])
        with contextlib.ExitStack() as stack:
            for module, names in launched:
                compilers = {name: Compiler(getattr(module, name), layout) for name in names}
                stack.enter_context(mock.patch.multiple(module, **compilers))
            y, saved = triton_channels.forward(
                x, layout, parameter, parameter, parameter, parameter, 0.1, 1e-5, True, "silu", x
            )
            triton_channels.backward(x, x, layout, parameter, parameter, saved, "silu", y, True)
    return Compiler.made


if __name__ == "__main__":
    # What overflows here is meant to, and NumPy, which interprets, says so.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    task, file = sys.argv[1], Path(sys.argv[2])
    torch.save(run_all(sys.argv[3]) if task == "run" else compile_all(), file)
