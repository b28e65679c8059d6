"""The Triton kernels of per-sample normalization against the float64 reference: interpreted, or on a GPU.

Kernels run in another process (`triton_samples_worker`), which also says what the real compiler makes of them.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normkit import reference
from normkit.kernels.forms import Form
from normkit.kernels.triton.samples import passes as triton_samples
from tolerances import FORWARD_ULP, assert_close

from .triton_process import CONSTANT, HUGE, INSTALLED, NAN, NORMAL, needs_triton, run_worker
from .triton_samples_worker import CASES, Case

ORDINARY = [k for k, case in enumerate(CASES) if not case.name.startswith("troubled")]
TROUBLED = [k for k, case in enumerate(CASES) if case.name.startswith("troubled")]

Results = list[dict[str, Any]]


def name_of(k: int) -> str:
    return f"{CASES[k].name}, {'last' if CASES[k].last else 'first'}".replace(" ", "-").replace(",", "")


work = partial(run_worker, "triton_samples_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return work(tmp_path_factory.mktemp("triton") / "results.pt", "run", "cpu", interpreted=True)


def judge(case: Case, x: np.ndarray, dy: np.ndarray) -> dict[str, Tensor]:
    """What the reference makes of these values."""
    given = case.inputs()
    weight, bias = (None if given[name] is None else given[name].double().numpy() for name in ("weight", "bias"))
    if case.centre:
        step = reference.group_norm(x, case.groups, weight, bias)
    else:
        step = reference.rms_norm(x, x.shape[1], weight, eps=1e-5)
    z = torch.from_numpy(step.output).requires_grad_()
    y = z if case.activation is None else getattr(F, case.activation)(z)
    (dz,) = torch.autograd.grad(y, z, torch.from_numpy(dy))
    back = (reference.group_norm_backward if case.centre else reference.rms_norm_backward)(dz.numpy(), step)
    found = {"y": y.detach(), "dx": back.dx, "dweight": back.dweight}
    if case.centre:
        found |= {"rstd": step.rstd.ravel(), "mean": step.mean.ravel(), "dbias": back.dbias}
        found["var"] = step.var.ravel()
    else:
        found["rstd"] = step.rrms.ravel()
    return {name: torch.as_tensor(value) for name, value in found.items()}


def expected(case: Case) -> dict[str, Tensor]:
    """What the reference makes of a case."""
    given = case.inputs()
    return judge(case, given["x"].double().numpy(), given["dy"].double().numpy())


def assert_forward(case: Case, found: dict[str, Tensor]) -> None:
    want, y = expected(case), found["y"]
    assert y.dtype == case.dtype
    if case.dtype == torch.float32:
        error = (y.double() - want["y"]).abs() / want["y"].abs().clamp(min=1.0)
        assert error.max().item() <= FORWARD_ULP * torch.finfo(torch.float32).eps
    assert_close(y, want["y"], dtype=case.dtype, what="y")
    assert found["saved"].dtype == torch.float64
    assert_close(found["saved"][1], want["rstd"], dtype=torch.float32, what="rstd")
    if case.centre:
        # In deviations: float32 itself is not exact at mean/std 1e4.
        off = (found["saved"][0] - want["mean"]) * want["rstd"]
        assert_close(off, torch.zeros_like(off), dtype=torch.float32, what="mean")
        assert_close(found["variance"] * want["rstd"] ** 2, want["var"] * want["rstd"] ** 2, dtype=torch.float32)
    else:
        assert not found["saved"][0].any()


def assert_gradients(case: Case, found: dict[str, Tensor]) -> None:
    want = expected(case)
    assert_close(found["dx"], want["dx"], dtype=case.dtype, what="dx")
    for name in ("dweight", "dbias") if case.centre else ("dweight",):
        assert found[name].dtype == torch.float32
        assert_close(found[name], want[name], dtype=torch.float32, what=name)


def assert_trouble_stays(case: Case, found: dict[str, Tensor]) -> None:
    """A constant sample is the bias exactly, a NaN stays in its group, and squares that overflow lose nothing."""
    given = case.inputs()
    y, dx, (mean, rstd) = found["y"], found["dx"], found["saved"].view(2, case.shape[0], case.groups)
    shape = (-1, *(1 for _ in case.shape[2:]))
    assert torch.equal(y[CONSTANT], given["bias"].view(shape).expand_as(y[CONSTANT]))
    assert (mean[CONSTANT] == 1e10).all()
    assert not dx[CONSTANT].isnan().any()
    first_group = slice(0, case.shape[1] // case.groups)
    for value in (y, dx):
        assert value[NAN, first_group].isnan().all()
        broken = value.isnan()
        broken[NAN, first_group] = False
        assert not broken.any()
    assert rstd.isnan().nonzero().tolist() == [[NAN, 0]]
    for sample, scale in ((NORMAL, 1.0), (HUGE, 1e30)):
        alone = slice(sample, sample + 1)
        want = judge(case, given["x"][alone].double().numpy(), given["dy"][alone].double().numpy())
        assert_close(y[alone], want["y"], dtype=torch.float32, what="y")
        # Gradients of about 1e-30, where squares of the scale would be zero in float32.
        assert_close(dx[alone].double() * scale, want["dx"] * scale, dtype=torch.float32, what="dx")


@needs_triton
@pytest.mark.parametrize("k", ORDINARY, ids=name_of)
def test_forward_matches_the_reference_in_every_layout_and_cut(results: Results, k: int) -> None:
    assert_forward(CASES[k], results[k])


@needs_triton
@pytest.mark.parametrize("k", ORDINARY, ids=name_of)
def test_gradients_match_the_reference_in_every_layout_and_cut(results: Results, k: int) -> None:
    assert_gradients(CASES[k], results[k])


@needs_triton
@pytest.mark.parametrize("k", TROUBLED, ids=name_of)
def test_constants_nan_and_huge_values_stay_in_their_rows(results: Results, k: int) -> None:
    assert_trouble_stays(CASES[k], results[k])


@needs_triton
def test_cases_run_whole_and_in_shares_as_their_names_say(results: Results) -> None:
    crowded = 0
    for case, found in zip(CASES, results[:-1], strict=True):
        splits, whole, depth, is_loop = found["cut"].tolist()
        assert (splits > 1) == ("shares" in case.name), case
        assert bool(whole) == (not case.last and not case.small_cut), case
        crowded += bool(whole) and depth > 1 and bool(is_loop)
    # Several lines to a tile, and several tiles to a program.
    assert crowded >= 4


@needs_triton
def test_kernels_compile_for_a_gpu_without_one(tmp_path: Path) -> None:
    made = work(tmp_path / "made.pt", "compile", interpreted=False)
    by_lines = {f"elementwise {name}" for name in ("forward_lines", "backward_lines", "add_parts")}
    columns = ("partial_columns", "apply_columns", "backward_partial_columns", "apply_backward_columns")
    merging = ("finish_rows", "finish_row_sums", "add_parts")
    by_columns = {f"{layout} {name}" for layout in ("contiguous", "channels_last") for name in (*columns, *merging)}
    assert set(made) == by_lines | by_columns
    for name, kernel in made.items():
        assert kernel["bytes"] > 0, name
        assert "atom." not in kernel["ptx"], name
        if name.endswith(("_lines", "_columns")):
            # Sixteen bytes at a time, or the memory is not used up.
            assert "ld.global.v4.b32" in kernel["ptx"], name


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_what_the_reference_gives(tmp_path: Path) -> None:
    found = work(tmp_path / "results.pt", "run", "cuda", interpreted=False)
    for k in ORDINARY:
        assert_forward(CASES[k], found[k])
        assert_gradients(CASES[k], found[k])
    for k in TROUBLED:
        assert_trouble_stays(CASES[k], found[k])


def test_unavailable_says_why() -> None:
    form = Form("elementwise", 2, 2, 1, 1)
    assert "float64" in str(triton_samples.unavailable(torch.ones(2, 2, dtype=torch.float64), form))
    said = str(triton_samples.unavailable(torch.ones(2, 2), form))
    assert ("a tensor on cpu" in said) if INSTALLED else ("not installed" in said)
    long = triton_samples.unavailable(torch.ones(2, 2), Form("elementwise", 1, 32768, 1, 1))
    assert "rows of at most 16384 elements that have a weight each, got 32768" in str(long)


@pytest.mark.parametrize(
    ("x", "layout"),
    [
        (torch.ones(2, 6, 3, 5), "contiguous"),
        (torch.ones(2, 6, 3, 5).to(memory_format=torch.channels_last), "channels_last"),
        (torch.ones(2, 6, 5, 3).transpose(2, 3), "contiguous"),
        (torch.ones(2, 5, 3, 6).permute(0, 3, 2, 1), "channels_last"),
        (torch.ones(2, 6), "elementwise"),
        (torch.ones(2, 6, 1, 1), "elementwise"),
        (torch.ones(2, 6, 3, 10)[..., ::2], None),
        (torch.ones(2, 3, 6, 5).transpose(1, 2), None),
    ],
)
def test_form_says_how_a_tensor_lies_in_memory(x: Tensor, layout: str | None) -> None:
    form = triton_samples.form_of(x, 3)
    positions = x[0, 0].numel()
    assert form == (None if layout is None else Form(layout, 2, 6, positions, 3))


@needs_triton
def test_public_functions_run_the_kernels_where_they_are_asked_for(results: Results) -> None:
    found = results[-1]
    x, dy, weight, bias = (found[name].double() for name in ("x", "dy", "weight", "bias"))
    assert found["calls"] == 4
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    y = F.silu(F.group_norm(leaves[0], 2, *leaves[1:]))
    expected = (y.detach(), *torch.autograd.grad(y, leaves, dy))
    for value, judged, what in zip(found["group"], expected, ("y", "dx", "dweight", "dbias"), strict=True):
        assert_close(value, judged, dtype=torch.float32, what=what)
    mean, var = torch.zeros(6).double(), torch.ones(6).double()
    for value, judged in zip(found["instance"], (F.instance_norm(x, mean, var), mean, var), strict=True):
        assert_close(value, judged, dtype=torch.float32)
    assert_close(found["layer"], F.layer_norm(x.transpose(1, 2), (6,), weight), dtype=torch.float32)
    assert_close(found["rms"], F.rms_norm(x, (5,), eps=1e-5), dtype=torch.float32)


@needs_triton
def test_explanation_and_refusals_are_those_of_kernels_per_sample(results: Results) -> None:
    found = results[-1]
    assert found["explained"].splitlines()[0] == "triton: per sample on the GPU"
    assert len(found["refused"]) == 2
    for said in found["refused"]:
        assert said.startswith("the triton backend cannot serve this call: Triton kernels take rows of at most 16384")


def test_form_of_rows_takes_the_last_dimensions() -> None:
    assert triton_samples.form_of_rows(torch.ones(2, 3, 4, 5), 2) == Form("elementwise", 6, 20, 1, 1)
    assert triton_samples.form_of_rows(torch.ones(2, 3, 4).transpose(1, 2), 1) is None


def test_triton_is_not_imported_where_it_is_not_asked_for() -> None:
    code = "import sys, normkit; from normkit.kernels.triton.samples import passes; assert 'triton' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    "form",
    [
        Form("contiguous", 32, 64, 12544, 32),
        Form("channels_last", 32, 64, 12544, 32),
        Form("contiguous", 32, 2048, 49, 32),
        Form("channels_last", 32, 2048, 49, 2048),
        Form("contiguous", 2, 3, 160001, 3),
        Form("channels_last", 2, 3, 160001, 1),
        Form("elementwise", 8192, 8192, 1, 1),
        Form("elementwise", 32, 128, 1, 1),
        Form("elementwise", 262144, 128, 1, 1),
    ],
    ids=str,
)
def test_plan_covers_every_value_and_gives_every_share_a_tile(form: Form) -> None:
    cut = triton_samples.plan(form)
    assert (cut.tiles - 1) * cut.depth < form.positions <= cut.tiles * cut.depth
    assert 1 <= cut.splits <= min(cut.tiles, 256)
    assert cut.grid[0] * cut.run >= cut.columns
    assert cut.depth * cut.run <= 4096
    if cut.whole:
        assert cut.width <= cut.line_run
        assert cut.line_depth * cut.line_run <= 16384
        programs, shares = cut.line_grid(512)
        assert programs == form.groups
        assert 1 <= shares <= cut.line_tiles
