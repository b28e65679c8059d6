"""The numbers of the CPU kernels: in every way they cut their work, with every activation, in every type.

Each test says which kernel ran: nothing here is compared with torch operations that served the call instead.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import normkit
from normkit import reference
from normkit.functional import batch_norm
from normkit.kernels.numba.channels import passes, plan
from tolerances import FORWARD_ULP, assert_close

from .shapes import WAYS, tensor

ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu")
every_way = pytest.mark.parametrize("way", WAYS)
each_layout = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)


@pytest.fixture(autouse=True)
def some_kernel_ran(kernels_ran):
    yield
    assert kernels_ran, "no kernel ran"


def ulps(y: Tensor, expected: np.ndarray) -> float:
    """The largest error of a float32 result, in units in the last place of max(1, |y|)."""
    unit = np.spacing(np.maximum(1, np.abs(expected)).astype(np.float32)).astype(np.float64)
    return float((np.abs(y.detach().double().numpy() - expected) / unit).max())


@pytest.mark.parametrize("mean", [0.0, 1e4])
@every_way
def test_float32_is_within_the_promised_ulps(way, mean, kernels_ran):
    x = (tensor(way) - 3) / 2 + mean
    y = batch_norm(x, None, None, training=True)
    layout, fused = WAYS[way][1:]
    assert (f"{layout}.forward" if fused else f"{layout}.partial") in kernels_ran.names()
    assert ulps(y, reference.batch_norm(x.double().numpy()).output) <= FORWARD_ULP


@pytest.mark.parametrize("channels", [1, 3, 6, 12, 24, 33, 65])
def test_folded_channels_are_within_the_promised_ulps(channels, kernels_ran):
    for rows in (57, 1031):
        for mean in (0.0, 1e4):
            x = torch.randn(rows, channels) + mean
            y = batch_norm(x, None, None, training=True)
            assert ulps(y, reference.batch_norm(x.double().numpy()).output) <= FORWARD_ULP
    assert kernels_ran.names() & {"channels_last.apply", "channels_last.forward"}


@every_way
def test_gradients_match_the_reference(way, kernels_ran):
    x = tensor(way).requires_grad_()
    channels = x.shape[1]
    weight, bias = torch.randn(channels, requires_grad=True), torch.randn(channels, requires_grad=True)
    y = batch_norm(x, None, None, weight, bias, True)
    dy = torch.randn_like(y)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    layout, fused = WAYS[way][1:]
    assert kernels_ran.names() & {f"{layout}.backward" if fused else f"{layout}.backward_partial"}
    step = reference.batch_norm(*(value.detach().double().numpy() for value in (x, weight, bias)))
    back = reference.batch_norm_backward(dy.double().numpy(), step)
    assert_close(dx, torch.from_numpy(back.dx), dtype=torch.float32, what="dx")
    assert_close(dweight, torch.from_numpy(back.dweight), dtype=torch.float32, what="dweight")
    assert_close(dbias, torch.from_numpy(back.dbias), dtype=torch.float32, what="dbias")


@every_way
@pytest.mark.parametrize("value", [7.0, 0.1, 1e10])
def test_constant_channel_gives_the_bias_exactly(way, value, kernels_ran):
    x = tensor(way)
    x[:, 1] = value
    bias = torch.randn(x.shape[1])
    y = batch_norm(x, None, None, None, bias, True)
    assert torch.equal(y[:, 1], bias[1].expand_as(y[:, 1]))


@every_way
@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_huge_values_stay_finite(way, scale, kernels_ran):
    x = (tensor(way).double() * scale).float()
    y = batch_norm(x, None, None, training=True)
    assert torch.isfinite(y).all()
    assert ulps(y, reference.batch_norm(x.double().numpy()).output) <= FORWARD_ULP


@every_way
def test_nan_stays_in_its_channel(way, kernels_ran):
    x, dy = tensor(way), tensor(way)
    results = []
    for bad in (False, True):
        leaf = x.clone()
        if bad:
            leaf[-1, 1] = math.nan
        leaf.requires_grad_()
        mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
        y = batch_norm(leaf, mean, var, training=True)
        results.append((y.detach(), torch.autograd.grad(y, leaf, dy)[0], mean[None], var[None]))
    kept = [channel for channel in range(x.shape[1]) if channel != 1]
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(dirty[:, kept], clean[:, kept])
        assert dirty[:, 1].isnan().any()


@pytest.mark.parametrize("channels", [3, 24, 33, 64])
@each_layout
def test_exactly_representable_statistics_are_exact(channels, memory_format, kernels_ran):
    index = torch.arange(32 * 16 * 16)
    k, sign = (index // 2 * 1637) % 32, 1 - 2 * (index % 2)
    centre = 2.0 ** (torch.arange(channels) % 7 - 2)
    x = (centre[:, None] * (1 + sign * k / 32)).reshape(channels, 32, 16, 16).transpose(0, 1)
    mean, var = torch.zeros(channels), torch.ones(channels)
    batch_norm(x.contiguous(memory_format=memory_format), mean, var, training=True, momentum=1.0, unbiased=False)
    layout = "contiguous" if memory_format is torch.contiguous_format else "channels_last"
    assert {name.partition(".")[0] for name in kernels_ran.names()} == {layout}
    assert torch.equal(mean, centre)
    assert torch.equal(var.double(), centre.double() ** 2 * k.double().square().mean() / 1024)


@each_layout
def test_float64_is_exact_to_twelve_digits(memory_format, kernels_ran):
    x = (torch.randn(5, 17, 11, 7, dtype=torch.float64) + 1e4).to(memory_format=memory_format)
    y = batch_norm(x, None, None, training=True)
    assert kernels_ran.dtypes() == {torch.float64}
    assert_close(y, torch.from_numpy(reference.batch_norm(x.numpy()).output), dtype=torch.float64)


@each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(dtype, memory_format, kernels_ran):
    x = (torch.randn(5, 17, 11, 7) * 2 + 3).to(dtype).to(memory_format=memory_format)
    weight, bias = torch.randn(17), torch.randn(17)
    y, wide = (batch_norm(value, None, None, weight, bias, True) for value in (x, x.float()))
    assert kernels_ran.dtypes() == {dtype, torch.float32}
    assert y.dtype is dtype
    assert torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize(
    ("activation", "with_residual"), [("relu", True), ("silu", True), ("relu6", False), ("leaky_relu", False)]
)
def test_fused_activation_matches_float64_operations(activation, with_residual, kernels_ran):
    """Output and every gradient; the layouts take turns, because every kernel costs seconds to compile."""
    memory_format = torch.channels_last if activation in ("relu6", "silu") else torch.contiguous_format
    x, residual, dy = (torch.randn(3, 80, 13, 11).to(memory_format=memory_format) * 2 for _ in range(3))
    leaves = [x, torch.randn(80), torch.randn(80), *([residual] if with_residual else [])]
    found, expected = [], []
    for results, dtype in ((found, torch.float32), (expected, torch.float64)):
        given = [value.to(dtype).requires_grad_() for value in leaves]
        shortcut = given[3] if with_residual else None
        if dtype is torch.float32:
            y = batch_norm(given[0], None, None, *given[1:3], True, activation=activation, residual=shortcut)
        else:
            y = torch.nn.functional.batch_norm(given[0], None, None, *given[1:3], True)
            y = getattr(torch.nn.functional, activation)(y if shortcut is None else y + shortcut)
        results += [y.detach(), *torch.autograd.grad(y, given, dy.to(dtype))]
    assert (activation, with_residual) in {which[2:] for which in kernels_ran}
    for name, one, other in zip(("y", "dx", "dweight", "dbias", "dresidual"), found, expected, strict=False):
        assert_close(one, other, dtype=torch.float32, what=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_of_the_fused_layer_match_differences(activation, kernels_ran):
    layer = normkit.BatchNormAct1d(2, activation=activation, dtype=torch.float64)
    torch.nn.init.normal_(layer.norm.weight)
    x, residual = (torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(layer, (x, residual))
    assert (activation, True) in {which[2:] for which in kernels_ran}


def test_stored_statistics_are_used_in_both_layouts(kernels_ran):
    for way in ("contiguous", "channels_last, folded"):
        x = tensor(way)
        mean, var = torch.randn(x.shape[1]), torch.rand(x.shape[1]) + 0.5
        y = batch_norm(x, mean, var)
        expected = reference.batch_norm_inference(*(value.double().numpy() for value in (x, mean, var)))
        assert_close(y, torch.from_numpy(expected.output), dtype=torch.float32)
    assert kernels_ran.names() >= {"contiguous.apply", "channels_last.apply"}


@each_layout
def test_variance_that_float32_cannot_hold_is_stored_as_infinity_and_predicts_the_bias(memory_format, kernels_ran):
    """The batch's own statistics are float64: only what is stored overflows, from values of 1.8e19, as torch's does."""
    x = (torch.randn(8, 3, 5, 7).double() * 1e20).float().to(memory_format=memory_format)
    bias = torch.randn(3)
    ours, theirs = [torch.zeros(3), torch.ones(3)], [torch.zeros(3), torch.ones(3)]
    y = batch_norm(x, *ours, None, bias, training=True)
    expected = reference.batch_norm(x.double().numpy(), bias=bias.double().numpy()).output
    assert ulps(y, expected) <= FORWARD_ULP
    torch.nn.functional.batch_norm(x, *theirs, training=True)
    assert torch.isposinf(ours[1]).all()
    assert torch.isposinf(theirs[1]).all()
    assert_close(ours[0], theirs[0], dtype=torch.float32)
    assert torch.equal(batch_norm(x, *ours, None, bias), bias.view(1, 3, 1, 1).expand_as(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((8, 32, 29, 27), "contiguous"), ((3, 3, 131, 127), "contiguous"), ((6, 64, 29, 27), "channels_last"),
     ((3, 48, 29, 31), "channels_last"), ((2, 144, 29, 27), "channels_last")],
)  # fmt: skip
def test_what_is_streamed_is_equal_in_every_bit(shape, layout, dtype, monkeypatch):
    """Planes of 783 values and of 16637 begin between two vectors of memory; their ends are written through."""
    x, dy, residual = (torch.randn(shape).to(dtype) for _ in range(3))
    if layout == "channels_last":
        x, dy, residual = (value.contiguous(memory_format=torch.channels_last) for value in (x, dy, residual))
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])

    def results():
        plan.plan.cache_clear()
        y, saved = passes.forward(x, layout, weight, bias, None, None, 0.1, 1e-5, True, "relu", residual)
        gradients = passes.backward(dy, x, layout, weight, bias, saved, "relu", y, True)
        return plan.plan(shape, layout, x.element_size()).stream, (y, saved, *gradients)

    written, expected = results()
    monkeypatch.setattr(plan, "_STREAMED", 0)
    monkeypatch.setattr(plan, "streamed_from", lambda: 0)
    streamed, found = results()
    monkeypatch.undo()
    plan.plan.cache_clear()
    assert (written, streamed) == (False, dtype is torch.float32 or layout == "contiguous" or shape[1] != 144)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
