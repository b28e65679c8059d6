"""The Triton kernels against the float64 reference: interpreted on a CPU, and on a GPU where there is one.

Kernels run in another process (`triton_channels_worker`), which also says what the real compiler makes of them.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normkit import reference
from normkit.kernels.triton.channels import passes as triton_channels
from tolerances import FORWARD_ULP, RELATIVE, assert_close

from .triton_channels_worker import CASES, Case
from .triton_process import CONSTANT, HUGE, INSTALLED, NAN, NORMAL, needs_triton, run_worker

ORDINARY = [k for k, case in enumerate(CASES) if not case.name.startswith("troubled")]
TROUBLED = [k for k, case in enumerate(CASES) if case.name.startswith("troubled")]

Results = list[dict[str, Tensor]]


def name_of(k: int) -> str:
    return f"{CASES[k].name}, {CASES[k].layout}".replace(" ", "-").replace(",", "")


work = partial(run_worker, "triton_channels_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return work(tmp_path_factory.mktemp("triton") / "results.pt", "run", "cpu", interpreted=True)


def exact(value: Tensor | None) -> np.ndarray | None:
    return None if value is None else value.double().numpy()


def expected(case: Case) -> dict[str, Tensor | None]:
    """What the reference makes of a case."""
    given = case.inputs()
    x, dy, residual, weight, bias, running_mean, running_var = map(exact, given.values())
    if case.stored:
        forward = reference.batch_norm_inference(x, running_mean, running_var, weight, bias)
    else:
        forward = reference.batch_norm(x, weight, bias)
        before = reference.Running(mean=running_mean, var=running_var)
        after = reference.running_update(before, reference.batch_statistics(x), momentum=0.1)
        running_mean, running_var = after.mean, after.var
    z = torch.from_numpy(forward.output).requires_grad_()
    summed = z if residual is None else z + torch.from_numpy(residual)
    y = summed if case.activation is None else getattr(F, case.activation)(summed)
    (dz,) = torch.autograd.grad(y, z, torch.from_numpy(dy))
    carry_back = reference.batch_norm_inference_backward if case.stored else reference.batch_norm_backward
    backward = carry_back(dz.numpy(), forward)
    found = {"saved": np.stack([forward.mean, forward.rstd]), "running_mean": running_mean, "running_var": running_var}
    found |= {"dx": backward.dx, "dweight": backward.dweight, "dbias": backward.dbias}
    return {name: torch.from_numpy(value) for name, value in found.items()} | {
        "y": y.detach(),
        "normalized": z.detach(),
        "dresidual": None if residual is None else dz,
    }


def assert_forward(case: Case, found: dict[str, Tensor]) -> None:
    wanted, y = expected(case), found["y"]
    want = wanted["y"]
    assert y.dtype == case.dtype
    if case.dtype == torch.float32:
        # A residual may cancel what was normalized, and the rounding of both stays.
        scale = torch.maximum(want.abs(), wanted["normalized"].abs()).clamp(min=1.0)
        error = (y.double() - want).abs() / scale
        assert error.max().item() <= FORWARD_ULP * torch.finfo(torch.float32).eps
    assert_close(y, want, dtype=case.dtype, what="y")


def assert_statistics(case: Case, found: dict[str, Tensor]) -> None:
    want = expected(case)
    assert found["saved"].dtype == torch.float64
    mean, rstd = found["saved"]
    # The mean, in deviations, is as exact as y; float32 itself is not at mean/std 1e4.
    assert_close(mean * want["saved"][1], want["saved"][0] * want["saved"][1], dtype=torch.float32, what="mean")
    off = ((mean - want["saved"][0]) * want["saved"][1]).abs().max().item()
    assert off <= RELATIVE[torch.float32], f"mean: off by {off:.3g} deviations"
    assert_close(rstd, want["saved"][1], dtype=torch.float32, what="rstd")
    for name in ("running_mean", "running_var"):
        assert_close(found[name], want[name], dtype=torch.float32, what=name)


def assert_gradients(case: Case, found: dict[str, Tensor]) -> None:
    want = expected(case)
    assert_close(found["dx"], want["dx"], dtype=case.dtype, what="dx")
    for name in ("dweight", "dbias"):
        assert found[name].dtype == torch.float32
        assert_close(found[name], want[name], dtype=torch.float32, what=name)
    if case.residual:
        assert_close(found["dresidual"], want["dresidual"], dtype=case.dtype, what="dresidual")
    else:
        assert found["dresidual"] is None


def assert_constant_channel(found: dict[str, Tensor], bias: Tensor) -> None:
    y = found["y"][:, CONSTANT]
    assert torch.equal(y, bias[CONSTANT].expand_as(y))
    assert found["saved"][0, CONSTANT].item() == 1e10
    assert not found["dx"][:, CONSTANT].isnan().any()


def assert_nan_stays(found: dict[str, Tensor]) -> None:
    for name in ("y", "dx"):
        assert found[name][:, NAN].isnan().all()
        assert not found[name][:, [NORMAL, CONSTANT, HUGE]].isnan().any()
    broken = found["saved"].isnan().any(0) | found["running_mean"].isnan() | found["dweight"].isnan()
    assert broken.nonzero().flatten().tolist() == [NAN]


def assert_huge_channel(case: Case, found: dict[str, Tensor]) -> None:
    given = case.inputs()
    alone = [exact(given[name][:, [NORMAL, HUGE]]) for name in ("x", "dy")]
    weight, bias = (exact(given[name][[NORMAL, HUGE]]) for name in ("weight", "bias"))
    forward = reference.batch_norm(alone[0], weight, bias)
    backward = reference.batch_norm_backward(alone[1], forward)
    for name, want in (("y", forward.output), ("dweight", backward.dweight), ("dbias", backward.dbias)):
        got = found[name][:, [NORMAL, HUGE]] if name == "y" else found[name][[NORMAL, HUGE]]
        assert_close(got, torch.from_numpy(want), dtype=torch.float32, what=name)
    # Gradients of about 1e-30, where squares of the scale would be zero in float32.
    dx, want = found["dx"][:, HUGE].double() * 1e30, torch.from_numpy(backward.dx[:, 1]) * 1e30
    assert_close(dx, want, dtype=torch.float32, what="dx")


@needs_triton
@pytest.mark.parametrize("k", ORDINARY, ids=name_of)
def test_forward_matches_the_reference_in_every_layout_and_cut(results: Results, k: int) -> None:
    assert_forward(CASES[k], results[k])


@needs_triton
@pytest.mark.parametrize("k", ORDINARY, ids=name_of)
def test_statistics_match_the_reference_in_every_layout_and_cut(results: Results, k: int) -> None:
    assert_statistics(CASES[k], results[k])


@needs_triton
@pytest.mark.parametrize("k", ORDINARY, ids=name_of)
def test_gradients_match_the_reference_in_every_layout_and_cut(results: Results, k: int) -> None:
    assert_gradients(CASES[k], results[k])


@needs_triton
@pytest.mark.parametrize("k", TROUBLED, ids=name_of)
def test_constant_channel_gives_the_bias_exactly_at_1e10(results: Results, k: int) -> None:
    assert_constant_channel(results[k], CASES[k].inputs()["bias"])


@needs_triton
@pytest.mark.parametrize("k", TROUBLED, ids=name_of)
def test_nan_stays_in_its_channel_whatever_stands_beside(results: Results, k: int) -> None:
    assert_nan_stays(results[k])


@needs_triton
@pytest.mark.parametrize("k", TROUBLED, ids=name_of)
def test_values_of_1e30_stay_exact_where_their_squares_overflow(results: Results, k: int) -> None:
    assert_huge_channel(CASES[k], results[k])


@needs_triton
def test_cases_run_in_one_tile_and_in_shares_as_their_names_say(results: Results) -> None:
    for case, found in zip(CASES, results, strict=True):
        in_shares = case.small_cut or case.name == "tiles as they are cut"
        assert (found["shares"].item() > 1) == in_shares, case


@needs_triton
def test_kernels_compile_for_a_gpu_without_one(tmp_path: Path) -> None:
    made = work(tmp_path / "made.pt", "compile", interpreted=False)
    assert len(made) == 16
    for name, kernel in made.items():
        assert kernel["bytes"] > 0, name
        assert "atom." not in kernel["ptx"], name
    for layout in ("contiguous", "channels_last"):
        for name in ("partial", "apply", "backward_partial", "apply_backward"):
            # Sixteen bytes at a time, or the memory is not used up.
            assert "ld.global.v4.b32" in made[f"{layout} {name}"]["ptx"], (layout, name)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_what_the_reference_gives(tmp_path: Path) -> None:
    found = work(tmp_path / "results.pt", "run", "cuda", interpreted=False)
    for k in ORDINARY:
        assert_forward(CASES[k], found[k])
        assert_statistics(CASES[k], found[k])
        assert_gradients(CASES[k], found[k])
    for k in TROUBLED:
        assert_constant_channel(found[k], CASES[k].inputs()["bias"])
        assert_nan_stays(found[k])
        assert_huge_channel(CASES[k], found[k])


def test_unavailable_says_why() -> None:
    assert "float64" in str(triton_channels.unavailable(torch.ones(2, 2, dtype=torch.float64)))
    said = str(triton_channels.unavailable(torch.ones(2, 2)))
    assert ("a tensor on cpu" in said) if INSTALLED else ("not installed" in said)


def test_triton_is_not_imported_where_it_is_not_asked_for() -> None:
    code = "import sys, normkit; from normkit.kernels.triton.channels import passes; assert 'triton' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(32, 64, 112, 112), (32, 2048, 7, 7), (2, 32, 128, 128, 128), (8, 1, 160001), (2, 3)]
)
def test_plan_covers_every_value_and_gives_every_share_a_tile(shape: tuple[int, ...], layout: str) -> None:
    cut = triton_channels.plan(shape, layout)
    pieces = cut.outer * cut.chunks
    assert cut.chunks * cut.run >= cut.inner if not cut.rows else cut.programs * cut.run >= cut.channels
    assert (cut.tiles - 1) * cut.depth < pieces <= cut.tiles * cut.depth
    assert 1 <= cut.splits <= min(cut.tiles, 256)
    assert cut.depth * cut.run <= 16384
