"""Running statistics by one formula in every layer and kernel; parameter gradients that a NaN does not reach."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import normkit
from normkit.functional import batch_norm
from tolerances import assert_close

C = 5
FORMATS = {"contiguous": lambda x: x, "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1)}
every_format = pytest.mark.parametrize("lay", FORMATS.values(), ids=FORMATS)
# A vector of channels and a remainder, one row, folded rows, blocks, planes longer than a chunk.
SHAPES = ((7, 3), (64, 19), (5, 3, 4, 7), (3, 33, 5, 5), (2, 2, 67, 71), (2100, 2))
TRACKING = {
    "batch": lambda momentum: normkit.BatchNorm2d(C, momentum=momentum),
    "ghost": lambda momentum: normkit.GhostBatchNorm2d(C, momentum=momentum, ghost_size=3),
    "renorm": lambda momentum: normkit.BatchRenorm2d(C, momentum=momentum),
    "masked": lambda momentum: normkit.MaskedBatchNorm1d(C, momentum=momentum),
    "whitening": lambda momentum: normkit.WhiteningBatchNorm2d(C, momentum=momentum, num_groups=C),
    "instance": lambda momentum: normkit.InstanceNorm2d(C, momentum=momentum or 1.0, track_running_stats=True),
}


def exactly(x, divisor=1):
    """Mean and variance in long double, for rounding to be seen."""
    values = x.double().movedim(1, 0).flatten(1).numpy().astype(np.longdouble)
    return values.mean(1), values.var(1, ddof=divisor)


@pytest.mark.parametrize("backend", ["numba", "plain", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_format
def test_batch_norm_stores_the_rounded_sum_of_two_shares(backend, dtype, lay):
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    for shape in SHAPES:
        for momentum, scale, shift in ((0.0, 1.0, 0.0), (0.1, 1.0, 3.0), (1.0, 1e-9, 0.0), (1.0, 3.0, 1.0)):
            x = lay((torch.randn(shape) * scale + shift).to(dtype))
            mean, var = torch.randn(shape[1], dtype=exact), torch.rand(shape[1], dtype=exact) + 0.5
            (m, v), old = exactly(x), (mean.clone(), var.clone())
            function = torch.compile(batch_norm, backend="eager") if backend == "compiled" else batch_norm
            with normkit.use_backend("numba" if backend == "compiled" else backend):
                function(x, mean, var, None, None, True, momentum)
            for name, found, before, batch in (("mean", mean, old[0], m), ("variance", var, old[1], v)):
                wanted = (1 - momentum) * before.double().numpy() + momentum * batch
                if momentum == 0:
                    assert torch.equal(found, before), name
                size = np.abs(before.double().numpy()) * (1 - momentum) + momentum * np.abs(batch)
                digits = 8 * torch.finfo(exact).eps * size + 4e-6 * scale * (name == "mean")
                apart = np.abs(found.double().numpy() - wanted)
                assert (apart <= digits).all(), f"{name} of {shape} at momentum {momentum}: {apart.max()}"


@pytest.mark.parametrize("name", TRACKING)
def test_small_variances_survive_momentum_one_and_the_first_of_an_average(name):
    x = torch.randn(8, C, 3, 7) * 1e-9
    given = x.flatten(2) if name == "masked" else x
    for momentum in (1.0, None):
        layer = TRACKING[name](momentum)
        layer(given, torch.ones(8, 21, dtype=torch.bool)) if name == "masked" else layer(given)
        stored = getattr(layer, "running_var", None)
        found = layer.running_covariance.flatten() if stored is None else stored
        wanted = x.double().var((2, 3)).mean(0) if name == "instance" else torch.as_tensor(exactly(x)[1].astype(float))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", TRACKING)
def test_what_is_not_finite_stays_as_in_torch(name):
    x = torch.randn(8, C, 3, 7)
    layer = TRACKING[name](1.0)
    layer.running_mean[1] = float("nan")
    layer(x.flatten(2)) if name == "masked" else layer(x)
    twin = nn.BatchNorm2d(C, momentum=1.0)
    twin.running_mean[1] = float("nan")
    twin(x)
    assert layer.running_mean.isnan().tolist() == twin.running_mean.isnan().tolist()


@every_format
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (1e4, 1.0), (1e8, 1.0), (3.0, 1e-9)])
def test_float64_keeps_its_digits_where_the_mean_dwarfs_the_deviation(lay, shift, scale):
    for shape in (*SHAPES, (16, 32, 14, 14)):
        x = lay(torch.randn(shape, dtype=torch.float64) * scale + shift)
        mean, var = torch.zeros(2, shape[1], dtype=torch.float64)
        batch_norm(x, mean, var, training=True, momentum=1.0)
        m, v = exactly(x)
        assert np.abs((var.numpy() - v) / v).max() < 2e-15, shape
        assert np.abs(mean.numpy() - m).max() <= 4e-16 * x.abs().max().item(), shape


ACTIVATED = {
    "batch": lambda a: normkit.BatchNormAct2d(8, activation=a),
    "batch, evaluated": lambda a: normkit.BatchNormAct2d(8, activation=a).eval(),
    "group": lambda a: normkit.GroupNorm(2, 8) if a is None else None,
    "layer": lambda a: normkit.SampleLayerNorm(8) if a is None else None,
    "instance": lambda a: normkit.InstanceNorm2d(8, affine=True) if a is None else None,
    "last": lambda a: normkit.LayerNorm(7) if a is None else None,
    "ghost": lambda a: normkit.GhostBatchNorm2d(8, ghost_size=2) if a is None else None,
    "renorm": lambda a: normkit.BatchRenorm2d(8) if a is None else None,
}


@pytest.mark.parametrize("backend", ["numba", "plain"])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("name", ACTIVATED)
@every_format
def test_a_nan_in_the_input_stays_out_of_the_bias_gradient(name, activation, backend, lay):
    """The gradient of the bias is the sum of the cotangent; the slope where y is a NaN is torch's."""
    layer = ACTIVATED[name](activation)
    if layer is None:
        pytest.skip("has no activation")
    bias = layer.norm.bias if hasattr(layer, "norm") else layer.bias
    for shape in ((4, 8, 3, 7), (2, 8, 65, 7)):
        for poison in (float("nan"), float("inf")):
            x = torch.randn(shape)
            x[1, 3, 1, 2] = poison
            x, dy = lay(x).requires_grad_(), torch.randn(shape)
            with normkit.use_backend(backend):
                y = layer(x)
                (found,) = torch.autograd.grad(y, bias, dy)
            slope = torch.ones_like(dy)
            if activation is not None:
                # A NaN is not at most zero, nor above it: relu lets the gradient pass, leaky_relu does not.
                shut, closed = (y.detach() <= 0, 0.0) if activation == "relu" else (~(y.detach() > 0), 0.01)
                slope = torch.where(shut, closed, 1.0)
            kept = (dy * slope).double().sum([axis for axis in range(4) if axis != (3 if name == "last" else 1)])
            if poison != poison or activation is None:
                assert_close(found, kept, dtype=torch.float32, what=f"{shape} {poison}")


@pytest.mark.parametrize("backend", ["numba", "plain"])
@pytest.mark.parametrize("name", ["batch", "batch, evaluated", "group", "layer", "instance", "last", "ghost"])
@every_format
def test_a_nan_in_the_weight_stays_out_of_both_parameter_gradients(name, backend, lay):
    layer = ACTIVATED[name](None)
    norm = layer.norm if hasattr(layer, "norm") else layer
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        norm.weight[2] = float("nan")
    x, dy = lay(torch.randn(4, 8, 5, 7)), torch.randn(4, 8, 5, 7)
    with normkit.use_backend(backend):
        found = torch.autograd.grad(layer(x), [norm.weight, norm.bias], dy)
        wanted = torch.autograd.grad(twin(x), [twin.weight, twin.bias], dy)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, dtype=torch.float32)
