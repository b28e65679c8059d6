"""Runs the Triton kernels of per-sample normalization in a process of its own, as its twin does per channel.

``python triton_samples_worker.py run FILE DEVICE`` saves the results of every case, ``compile FILE`` what a compiler
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

import normkit
from normkit import functional
from normkit.errors import BackendError
from normkit.kernels.forms import Form
from normkit.kernels.triton.samples import passes as triton_samples

# Small enough that a small tensor has several shares of several tiles, and no line that is taken whole.
SMALL_CUT = {"_TILE": 256, "_WHOLE": 16, "_SPLITS": 3, "_CHUNK": 8}
# So few programs that a program has several tiles, and a tile several lines.
CROWDED = {"_TILE": 128, "_PROGRAMS": 2, "_SHARES": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the forward and the backward."""

    name: str
    shape: tuple[int, ...]
    groups: int = 1
    last: bool = False
    dtype: torch.dtype = torch.float32
    activation: str | None = None
    centre: bool = True
    affine: bool = True
    location: float = 0.0
    small_cut: bool = False

    def inputs(self) -> dict[str, Tensor | None]:
        """The tensors of this case, the same in every process."""
        generator = torch.Generator().manual_seed(len(self.name) + 7 * sum(self.shape))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        x = random(*self.shape) * 2 + self.location
        if self.name.startswith("troubled"):
            trouble(x)
        weight, bias = (random(self.shape[1]) if self.affine else None for _ in range(2))
        return {
            "x": self.laid_out(x),
            "dy": self.laid_out(random(*self.shape)),
            "weight": weight,
            "bias": bias if self.centre else None,
        }

    def laid_out(self, value: Tensor) -> Tensor:
        """The same in this case's layout and type."""
        value = value.to(self.dtype)
        return value.movedim(1, -1).contiguous().movedim(-1, 1) if self.last else value.contiguous()


def trouble(x: Tensor) -> None:
    """Make sample 1 constant and huge, put a NaN into sample 2, and scale sample 3 to where squares overflow."""
    x[1] = 1e10
    x[2].view(-1)[1] = torch.nan
    x[3] *= 1e30


CASES = [
    Case("layer", (7, 33)),
    Case("layer of one sample", (1, 64)),
    Case("layer of one element", (5, 1)),
    Case("layer without parameters", (6, 8), affine=False, activation="relu"),
    Case("layer in halves", (9, 129), dtype=torch.bfloat16, activation="silu"),
    Case("layer in many tiles", (70, 5), activation="relu6"),
    Case("root mean square", (7, 33), centre=False),
    Case("root mean square in halves", (5, 64), dtype=torch.float16, centre=False, activation="leaky_relu"),
    Case("root mean square far from zero", (5, 37), centre=False, location=2e4),
    Case("group of elements", (6, 12), groups=3, activation="silu"),
    Case("group", (3, 6, 5, 3), groups=2, activation="relu"),
    Case("group", (3, 6, 5, 3), groups=2, last=True, activation="relu"),
    Case("group in halves", (2, 8, 7, 3), groups=4, dtype=torch.float16, activation="relu6"),
    Case("group in halves", (2, 8, 7, 3), groups=4, last=True, dtype=torch.bfloat16, activation="silu"),
    Case("group in shares", (3, 6, 19, 10), groups=3, small_cut=True, activation="leaky_relu"),
    Case("group in shares", (3, 6, 19, 10), groups=3, last=True, small_cut=True, activation="leaky_relu"),
    Case("one group in shares", (2, 5, 11, 4, 4), small_cut=True, affine=False),
    Case("one group in shares", (2, 5, 11, 4, 4), last=True, small_cut=True),
    Case("instance", (3, 5, 7), groups=5),
    Case("instance", (3, 5, 7, 2), groups=5, last=True, activation="silu"),
    Case("instance in shares", (2, 3, 19, 10), groups=3, small_cut=True, dtype=torch.bfloat16),
    Case("instance in shares", (2, 3, 19, 10), groups=3, last=True, small_cut=True, dtype=torch.float16),
    Case("far from zero", (4, 6, 7, 7), groups=2, location=2e4),
    Case("far from zero", (4, 6, 7, 7), groups=2, last=True, location=2e4),
    Case("far from zero in shares", (3, 4, 19, 10), groups=2, location=2e4, small_cut=True),
    Case("far from zero, layer", (5, 67), location=2e4),
    Case("troubled", (5, 4, 6, 3), groups=2),
    Case("troubled", (5, 4, 6, 3), groups=2, last=True),
    Case("troubled in shares", (5, 4, 13, 10), groups=2, small_cut=True),
    Case("troubled layer", (5, 24)),
]


def form_of(case: Case, x: Tensor) -> Form:
    """How the kernels see x; layer and RMS normalization are of rows."""
    form = (
        triton_samples.form_of(x, case.groups) if case.groups > 1 or x.dim() > 2 else triton_samples.form_of_rows(x, 1)
    )
    assert form is not None
    assert form.layout == ("elementwise" if x.dim() == 2 else "channels_last" if case.last else "contiguous")
    return form


def run(case: Case, device: str) -> dict[str, Tensor]:
    """What the forward, and then the backward, make of a case."""
    x, dy, weight, bias = (None if value is None else value.to(device) for value in case.inputs().values())
    form = form_of(case, x)
    assert triton_samples.unavailable(x, form) is None
    variance = torch.empty(form.samples * form.groups, dtype=torch.float64, device=device)
    y, saved = triton_samples.forward(x, form, weight, bias, 1e-5, case.centre, case.activation, variance)
    settings = (case.centre, case.activation)
    dx, dweight, dbias = triton_samples.backward(dy, x, form, weight, bias, saved, *settings)
    if case.name in ("layer", "group"):
        alone, *unwanted = triton_samples.backward(dy, x, form, weight, bias, saved, *settings, False)
        assert torch.equal(alone, dx)
        assert unwanted == [None, None]
    cut = triton_samples.plan(form)
    found = {"y": y, "saved": saved, "variance": variance, "dx": dx, "dweight": dweight, "dbias": dbias}
    is_loop = cut.line_tiles > cut.line_grid(triton_samples._PROGRAMS)[1]
    found["cut"] = torch.tensor([cut.splits, int(cut.whole), cut.line_depth, int(is_loop)])
    return {name: value.cpu() for name, value in found.items()}


def serve(device: str) -> dict[str, Any]:
    """What the public functions make of a tensor where the Triton kernels are asked for."""
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(3, 6, 5, generator=generator).to(device) for _ in range(2))
    weight, bias = (torch.randn(6, generator=generator).to(device).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(6, device=device), torch.ones(6, device=device)
    found: dict[str, Any] = {"x": x, "dy": dy, "weight": weight.detach(), "bias": bias.detach()}
    leaves = (x.clone().requires_grad_(), weight, bias)
    with (
        normkit.use_backend("triton"),
        mock.patch.object(triton_samples, "forward", wraps=triton_samples.forward) as forward,
    ):
        y = functional.group_norm(leaves[0], 2, *leaves[1:], activation="silu")
        found["group"] = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        found["instance"] = [functional.instance_norm(x, mean, var), mean, var]
        found["layer"] = functional.layer_norm(x.transpose(1, 2), (6,), weight.detach())
        found["rms"] = functional.rms_norm(x, (5,), eps=1e-5)
        found["calls"] = forward.call_count
        found["explained"] = str(normkit.explain(normkit.GroupNorm(2, 6), x))
        found["refused"] = []
        for call in (
            lambda: functional.layer_norm(torch.zeros(1, 32768, device=device), (32768,)),
            lambda: normkit.explain(normkit.LayerNorm(32768), torch.zeros(1, 32768, device=device)),
        ):
            try:
                call()
            except BackendError as error:
                found["refused"].append(str(error))
    return {name: on_cpu(value) for name, value in found.items()}


def on_cpu(value: Any) -> Any:
    """The same, with every tensor on the CPU."""
    if isinstance(value, list):
        return [on_cpu(part) for part in value]
    return value.detach().cpu() if isinstance(value, Tensor) else value


def run_all(device: str) -> list[dict[str, Any]]:
    """The results of every case, and of the public functions, in memory that starts as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    results = []
    for case in CASES:
        triton_samples.plan.cache_clear()
        with mock.patch.dict(vars(triton_samples), SMALL_CUT if case.small_cut else CROWDED):
            results.append(run(case, device))
    triton_samples.plan.cache_clear()
    return [*results, serve(device)]


def compile_all() -> dict[str, dict[str, Any]]:
    """Every kernel, by layout and name."""
    from triton_channels_worker import Compiler

    from normkit.kernels.triton.samples import (
        backward as sample_backward,
    )
    from normkit.kernels.triton.samples import (
        forward as sample_forward,
    )
    from normkit.kernels.triton.samples import (
        steps as sample_steps,
    )

    launched = [
        (sample_forward, ("forward_lines", "partial_columns", "apply_columns")),
        (sample_backward, ("backward_lines", "backward_partial_columns", "apply_backward_columns")),
        (sample_steps, ("finish_rows", "finish_row_sums", "add_parts")),
    ]
    forms = [
        Form("elementwise", 4096, 1024, 1, 1),
        Form("contiguous", 32, 64, 3136, 2),
        Form("channels_last", 32, 64, 3136, 32),
    ]
    for form in forms:
        x = torch.empty((form.samples, form.channels, form.positions), dtype=torch.bfloat16)
        parameter = torch.ones(form.channels)
        with contextlib.ExitStack() as stack:
            for module, names in launched:
                compilers = {name: Compiler(getattr(module, name), form.layout) for name in names}
                stack.enter_context(mock.patch.multiple(module, **compilers))
            y, saved = triton_samples.forward(x, form, parameter, parameter, 1e-5, True, "silu")
            triton_samples.backward(y, x, form, parameter, parameter, saved, True, "silu")
    return Compiler.made


if __name__ == "__main__":
    # What overflows here is meant to, and NumPy, which interprets, says so.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    task, file = sys.argv[1], Path(sys.argv[2])
    torch.save(run_all(sys.argv[3]) if task == "run" else compile_all(), file)
