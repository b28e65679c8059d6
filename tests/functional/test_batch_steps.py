"""The four steps apart: against the plain ones, against the fused whole, and over a batch in two halves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normkit
from normkit.errors import BackendError, DtypeError, ShapeError
from normkit.functional import batch_norm, batch_steps
from normkit.kernels.plain import channels as plain_channels
from tolerances import FORWARD_ULP, assert_close

SHAPES = ((4, 3, 5, 7), (2, 17, 9, 9), (64, 128), (33, 5), (2, 19, 1, 1), (3, 2, 47, 53), (2, 7, 3, 5, 4), (1, 1, 2))
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def tensors(shape, dtype, *, channels_last=False):
    """X, dy, weight and bias, with a mean well away from zero."""
    x, dy = (torch.randn(shape) * 2 + 3).to(dtype), torch.randn(shape).to(dtype)
    if channels_last:
        x, dy = (value.movedim(1, -1).contiguous().movedim(-1, 1) for value in (x, dy))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return x, dy, torch.randn(shape[1], dtype=wide), torch.randn(shape[1], dtype=wide)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_step_is_the_plain_one(dtype, shape, channels_last, kernels_ran):
    x, dy, weight, bias = tensors(shape, dtype, channels_last=channels_last)
    count = 3 * x.numel() // shape[1]
    mean, var = plain_channels.statistics(x)
    rstd = (var + 1e-5).rsqrt()
    sums = plain_channels.reduce(dy, x, mean, rstd)
    calls = (
        ("statistics", (x,)),
        ("apply", (x, mean, rstd, weight, bias)),
        ("apply", (x, mean, rstd, None, None)),
        ("reduce", (dy, x, mean, rstd)),
        ("apply_backward", (dy, x, mean, rstd, weight, sums, count)),
        ("apply_backward", (dy, x, mean, rstd, None, sums, count)),
    )
    for name, arguments in calls:
        kernels_ran.clear()
        found, expected = getattr(batch_steps, name)(*arguments), getattr(plain_channels, name)(*arguments)
        assert kernels_ran.dtypes() == {dtype}
        as_tuple = (found, expected) if isinstance(found, tuple) else ((found,), (expected,))
        # Statistics and sums are float64, gathered in the type computed in.
        tolerance = dtype if name.startswith("apply") else (torch.float64 if dtype is torch.float64 else torch.float32)
        for one, other in zip(*as_tuple, strict=True):
            assert_close(one, other, dtype=tolerance, what=name)
        if name.startswith("apply"):
            assert found.dtype is dtype
            assert found.stride() == x.stride()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_steps_of_two_halves_are_the_whole(channels_last):
    x, dy, weight, bias = tensors((8, 5, 7, 3), torch.float32, channels_last=channels_last)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = batch_norm(leaf, None, None, weight, bias, training=True)
    y.backward(dy)
    mean, var = batch_steps.statistics(x)
    rstd = (var + 1e-5).rsqrt()
    halves = [slice(0, 3), slice(3, 8)]
    assert_close(torch.cat([batch_steps.apply(x[h], mean, rstd, weight, bias) for h in halves]), y, dtype=x.dtype)
    sums = [batch_steps.reduce(dy[h], x[h], mean, rstd) for h in halves]
    total = tuple(one + other for one, other in zip(*sums, strict=True))
    count = x.numel() // 5
    dx = torch.cat([batch_steps.apply_backward(dy[h], x[h], mean, rstd, weight, total, count) for h in halves])
    assert_close(dx, leaf.grad, dtype=x.dtype)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_statistics_stay_exact_where_the_mean_dwarfs_the_deviation(channels_last):
    x = torch.randn(5, 33, 31, 29, dtype=torch.float64) + 1e4
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).float()
    mean, var = batch_steps.statistics(x)
    axes = (0, 2, 3)
    rstd = (x.double().var(axes, correction=0) + 1e-5).rsqrt()
    expected = (x.double() - x.double().mean(axes)[:, None, None]) * rstd[:, None, None]
    y = batch_steps.apply(x, mean, (var + 1e-5).rsqrt())
    ulp = torch.finfo(torch.float32).eps * expected.abs().clamp(min=1)
    assert ((y.double() - expected).abs() / ulp).max() <= FORWARD_ULP


def test_results_do_not_depend_on_the_number_of_threads():
    x, dy, weight, _ = tensors((6, 5, 61, 67), torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            mean, var = batch_steps.statistics(x)
            sums = batch_steps.reduce(dy, x, mean, var.rsqrt())
            dx = batch_steps.apply_backward(dy, x, mean, var.rsqrt(), weight, sums, 6 * 61 * 67)
            found.append(torch.cat([mean, var, *sums, dx.flatten().double()]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_constant_channel_has_no_variance_and_a_strided_input_is_served():
    room = torch.full((4, 3, 10), 1e10)
    mean, var = batch_steps.statistics(room[..., ::2])
    assert torch.equal(mean, torch.full((3,), 1e10).double())
    assert torch.equal(var, torch.zeros(3).double())


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50))
def test_reduce_gives_the_closed_form_where_dy_is_one(samples, channels, positions):
    x = torch.randn(samples, channels, positions)
    mean, var = batch_steps.statistics(x)
    total, along = batch_steps.reduce(torch.ones_like(x), x, mean, (var + 1e-5).rsqrt())
    assert torch.equal(total, torch.full((channels,), samples * positions).double())
    assert along.abs().max() <= 1e-5 * samples * positions


def test_bad_arguments_are_named():
    x, mean = torch.randn(4, 3, 5), torch.zeros(3)
    with pytest.raises(DtypeError, match="int64"):
        batch_steps.statistics(torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"expected \(N, C\) or \(N, C, \*\) with values, got \(4,\)"):
        batch_steps.statistics(torch.ones(4))
    with pytest.raises(ShapeError, match="with values"):
        batch_steps.statistics(torch.ones(0, 3))
    with pytest.raises(ShapeError, match=r"weight must hold 3 numbers, one per channel; got \(4,\)"):
        batch_steps.apply(x, mean, mean, torch.ones(4))
    with pytest.raises(ShapeError, match=r"dy must match x"):
        batch_steps.reduce(x[:2], x, mean, mean)


def test_requested_backend_is_honoured_or_refused(kernels_ran):
    x = torch.randn(4, 3, 5)
    with normkit.use_backend("plain"):
        batch_steps.statistics(x)
    assert not kernels_ran
    with normkit.use_backend("triton"), pytest.raises(BackendError, match="triton"):
        torch.func.vmap(lambda one: batch_steps.statistics(one)[0])(x[None])
