"""functional.batch_norm against closed forms, the float64 reference and torch.

Only the public function is called, so that whatever kernel serves it is judged by the same tests.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from normkit import reference
from normkit.functional import batch_norm
from tolerances import FORWARD_ULP, assert_close
from torch_versions import uses_torchscript

SHAPES = ((8, 5), (13, 1), (7, 3, 11), (4, 6, 5, 3), (3, 7, 1, 2), (2, 3, 4, 3, 5), (1, 3, 2, 1), (5, 1, 1, 7))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _plain(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.to(memory_format=formats[x.dim()]) if x.dim() in formats else _plain(x)


def _transposed(x: Tensor) -> Tensor:
    return _plain(x.transpose(0, -1)).transpose(0, -1)


def _sliced(x: Tensor) -> Tensor:
    room = torch.full((2 * x.shape[0] + 1, x.shape[1] + 2, *x.shape[2:]), math.nan, dtype=x.dtype)
    view = room[1::2, 1:-1]
    return view.copy_(x)


def _strided(x: Tensor) -> Tensor:
    room = torch.full((*x.shape[:-1], 3 * x.shape[-1]), math.nan, dtype=x.dtype)
    view = room[..., 1::3]
    return view.copy_(x)


LAYOUTS = (_plain, _channels_last, _transposed, _sliced, _strided)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__.strip("_"))


def parameters(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias = torch.rand(channels, dtype=dtype) + 0.5, torch.randn(channels, dtype=dtype)
    return weight.requires_grad_(), bias.requires_grad_()


def ulps(y: Tensor, expected: np.ndarray) -> float:
    """The largest error of a float32 result, in units in the last place of max(1, |y|)."""
    unit = np.spacing(np.maximum(1, np.abs(expected)).astype(np.float32)).astype(np.float64)
    return float((np.abs(y.detach().double().numpy() - expected) / unit).max())


class Recorder(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_batch_norm_does_not_run(training):
    x, (weight, bias) = torch.randn(4, 3, 5, requires_grad=True), parameters(3, torch.float32)
    with Recorder() as recorder:
        y = batch_norm(x, torch.zeros(3), torch.ones(3), weight, bias, training)
        y.backward(torch.randn_like(y))
    assert recorder.names
    assert not [name for name in recorder.names if name.startswith("aten::") and "batch_norm" in name]


@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_matches_the_reference(shape, layout, kernels_ran):
    for dtype in DTYPES:
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        weight, bias = parameters(shape[1], exact)
        x = layout(torch.randn(shape, dtype=dtype) * 3 + 1).detach().requires_grad_()
        dy = layout(torch.randn(shape, dtype=dtype))
        y = batch_norm(x, None, None, weight, bias, True)
        dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
        assert kernels_ran.served(dtype)
        assert kernels_ran.served(dtype, backward=True)
        kernels_ran.clear()
        step = reference.batch_norm(*(v.detach().double().numpy() for v in (x, weight, bias)))
        back = reference.batch_norm_backward(dy.double().numpy(), step)
        assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (dtype, dtype, exact, exact)
        assert_close(y, torch.from_numpy(step.output), dtype=dtype, what=f"output {dtype}")
        assert_close(dx, torch.from_numpy(back.dx), dtype=dtype, what=f"input gradient {dtype}")
        assert_close(dweight, torch.from_numpy(back.dweight), dtype=exact, what=f"weight gradient {dtype}")
        assert_close(dbias, torch.from_numpy(back.dbias), dtype=exact, what=f"bias gradient {dtype}")


@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prediction_matches_the_reference(shape, layout, kernels_ran):
    for dtype in DTYPES:
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        weight, bias = parameters(shape[1], exact)
        mean, var = torch.randn(shape[1], dtype=exact), torch.rand(shape[1], dtype=exact) + 0.5
        kept = mean.clone(), var.clone()
        x = layout(torch.randn(shape, dtype=dtype) * 3 + 1).detach().requires_grad_()
        dy = layout(torch.randn(shape, dtype=dtype))
        y = batch_norm(x, mean, var, weight, bias, False)
        dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
        assert kernels_ran.served(dtype)
        assert kernels_ran.served(dtype, backward=True)
        kernels_ran.clear()
        step = reference.batch_norm_inference(*(v.detach().double().numpy() for v in (x, mean, var, weight, bias)))
        back = reference.batch_norm_inference_backward(dy.double().numpy(), step)
        assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (dtype, dtype, exact, exact)
        assert_close(y, torch.from_numpy(step.output), dtype=dtype, what=f"output {dtype}")
        assert_close(dx, torch.from_numpy(back.dx), dtype=dtype, what=f"input gradient {dtype}")
        assert_close(dweight, torch.from_numpy(back.dweight), dtype=exact, what=f"weight gradient {dtype}")
        assert_close(dbias, torch.from_numpy(back.dbias), dtype=exact, what=f"bias gradient {dtype}")
        assert torch.equal(mean, kept[0])
        assert torch.equal(var, kept[1])


@pytest.mark.parametrize("training", [True, False])
def test_expanded_input_counts_every_repetition(training):
    base = torch.randn(1, 3, 1, 5, dtype=torch.float64)
    x = base.expand(4, 3, 7, 5)
    running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    twin = [value.clone() for value in running]
    y, expected = batch_norm(x, *running, training=training), F.batch_norm(x.clone(), *twin, training=training)
    assert_close(y, expected, dtype=torch.float64)
    assert_close(running[1], twin[1], dtype=torch.float64)
    assert torch.equal(x, base.expand(4, 3, 7, 5))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (2, 3, 4, 3, 5), (3, 7, 1, 2), (5, 1, 3, 7)], ids=str)
def test_memory_format_is_kept(shape, training):
    running = torch.zeros(shape[1]), torch.ones(shape[1])
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for layout, memory_format in ((_plain, torch.contiguous_format), (_channels_last, last)):
        x = layout(torch.randn(shape)).requires_grad_()
        y = batch_norm(x, *running, training=training)
        (dx,) = torch.autograd.grad(y, x, layout(torch.randn(shape)))
        assert y.is_contiguous(memory_format=memory_format)
        assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("with_weight", "with_bias"), [*itertools.product([True, False], repeat=2)])
def test_missing_weight_is_one_and_missing_bias_zero(with_weight, with_bias, training):
    shape = (4, 3, 5)
    x, dy = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)
    weight, bias = parameters(3, torch.float64)
    running = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    weight, bias = weight if with_weight else None, bias if with_bias else None
    y = batch_norm(x, *(v.clone() for v in running), weight, bias, training)
    expected = F.batch_norm(x, *(v.clone() for v in running), weight, bias, training)
    leaves = [v for v in (x, weight, bias) if v is not None]
    assert_close(y, expected, dtype=torch.float64)
    for found, wanted in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert_close(found, wanted, dtype=torch.float64)


@pytest.mark.parametrize("leaf", ["x", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_one_argument_alone_matches_torch(leaf, training):
    values = {"x": torch.randn(4, 3, 5), "weight": torch.rand(3) + 0.5, "bias": torch.randn(3)}
    values = {name: value.double().requires_grad_(name == leaf) for name, value in values.items()}
    dy = torch.randn(4, 3, 5, dtype=torch.float64)

    def gradient(function):
        running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        y = function(values["x"], *running, values["weight"], values["bias"], training)
        return torch.autograd.grad(y, values[leaf], dy)[0]

    assert_close(gradient(batch_norm), gradient(F.batch_norm), dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 5), (2, 3, 3, 2)], ids=str)
def test_double_backward_matches_torch(shape, training):
    values = torch.randn(shape), torch.rand(shape[1]) + 0.5, torch.randn(shape[1]), torch.randn(shape)
    cotangents = [torch.randn_like(value).double() for value in values[:3]]

    def second(function):
        x, weight, bias, dy = leaves = [value.double().requires_grad_() for value in values]
        running = torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
        y = function(x, *running, weight, bias, training)
        first = torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True)
        return torch.autograd.grad(first, (leaves[0], leaves[1], leaves[3]), cotangents)

    for found, expected in zip(second(batch_norm), second(F.batch_norm), strict=True):
        assert_close(found, expected, dtype=torch.float64)


# torch compiles a decomposition the first time, with what it itself calls deprecated.
@uses_torchscript
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("moved", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_forward_derivative_matches_torch(moved, training):
    primals = torch.randn(4, 3, 5).double(), torch.rand(3).double() + 0.5, torch.randn(3).double()
    tangents = [torch.randn_like(value) for value in primals]

    def derivative(function):
        running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(value, tangents[index]) if index in moved else value
                for index, value in enumerate(primals)
            ]
            y = function(duals[0], *running, duals[1], duals[2], training)
            return forward_ad.unpack_dual(y).tangent

    assert_close(derivative(batch_norm), derivative(F.batch_norm), dtype=torch.float64)


def test_vmap_without_running_statistics_matches_a_loop():
    x, dy = torch.randn(6, 4, 3, 5, dtype=torch.float64), torch.randn(6, 4, 3, 5, dtype=torch.float64)
    weight, bias = torch.rand(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def gradients(x, weight, dy):
        y, pull = torch.func.vjp(lambda *args: batch_norm(args[0], None, None, args[1], args[2], True), x, weight, bias)
        return y, *pull(dy)

    found = torch.func.vmap(gradients, in_dims=(0, None, 0))(x, weight, dy)
    singly = [gradients(one, weight, cotangent) for one, cotangent in zip(x, dy, strict=True)]
    expected = [torch.stack(column) for column in zip(*singly, strict=True)]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, dtype=torch.float64)


def test_vmap_over_layers_matches_a_loop():
    x, weights = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(6, 3, dtype=torch.float64)
    means, variances = torch.randn(6, 3, dtype=torch.float64), torch.rand(6, 3, dtype=torch.float64) + 0.5

    def predict(mean, var, weight):
        return batch_norm(x, mean, var, weight, None, False)

    found = torch.func.vmap(predict)(means, variances, weights)
    expected = torch.stack([predict(*row) for row in zip(means, variances, weights, strict=True)])
    assert_close(found, expected, dtype=torch.float64)


def test_vmap_with_statistics_of_each_sample_updates_them():
    x = torch.randn(6, 4, 3, 5, dtype=torch.float64)
    means, variances = torch.zeros(6, 3, dtype=torch.float64), torch.ones(6, 3, dtype=torch.float64)
    torch.func.vmap(lambda a, mean, var: batch_norm(a, mean, var, training=True, momentum=1.0))(x, means, variances)
    assert_close(means, x.mean((1, 3)), dtype=torch.float64)
    assert_close(variances, x.transpose(1, 2).flatten(2).var(2), dtype=torch.float64)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("updates", [1, 2, 100])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
def test_running_statistics_follow_their_closed_form(momentum, updates, unbiased):
    batches = torch.randn(updates, 5, 3, 2, dtype=torch.float64) * 2 + 1
    mean, var = torch.full((3,), 0.25, dtype=torch.float64), torch.full((3,), 4.0, dtype=torch.float64)
    counter = torch.tensor(0)
    for batch in batches:
        batch_norm(batch, mean, var, training=True, momentum=momentum, unbiased=unbiased, num_batches_tracked=counter)
    # The weight of every batch, and what is left of the starting value.
    if momentum is None:
        weights, left = torch.full((updates,), 1 / updates, dtype=torch.float64), 0.0
    else:
        age = torch.arange(updates - 1, -1, -1, dtype=torch.float64)
        weights, left = momentum * (1 - momentum) ** age, (1 - momentum) ** updates
    values = batches.transpose(1, 2).flatten(2)
    assert counter.item() == updates
    assert_close(mean, 0.25 * left + weights @ values.mean(2), dtype=torch.float64)
    assert_close(var, 4.0 * left + weights @ values.var(2, correction=int(unbiased)), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_running_statistics_in_float32_match_torch(dtype):
    ours, theirs = [torch.zeros(3), torch.ones(3)], [torch.zeros(3), torch.ones(3)]
    for _ in range(3):
        x = torch.randn(4, 3, 5, dtype=torch.float32).to(dtype) if dtype is not torch.float64 else torch.randn(4, 3, 5)
        batch_norm(x, *ours, training=True)
        F.batch_norm(x, *theirs, training=True)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.dtype is torch.float32
        assert_close(found, expected, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0, 5), (0, 3, 2, 2, 2)], ids=str)
def test_empty_input_gives_an_empty_output_and_updates_nothing(shape):
    mean, var, counter = torch.full((3,), 0.5), torch.full((3,), 2.0), torch.tensor(7)
    x, (weight, bias) = torch.randn(shape, requires_grad=True), parameters(3, torch.float32)
    for training in (True, False):
        y = batch_norm(x, mean, var, weight, bias, training, num_batches_tracked=counter)
        gradients = torch.autograd.grad(y, (x, weight, bias), torch.randn_like(y))
        assert y.shape == x.shape
        assert [float(value.abs().sum()) for value in gradients] == [0.0, 0.0, 0.0]
    assert (mean.tolist(), var.tolist(), counter.item()) == ([0.5] * 3, [2.0] * 3, 7)


RATIOS = (0, 1, 10, 100, 1e3, 1e4)


@every_layout
@pytest.mark.parametrize("shape", [(1021, 3), (31, 3, 53), (16, 3, 17, 19), (7, 3, 5, 6, 7)], ids=str)
def test_output_is_within_four_ulp_for_any_mean(shape, layout, kernels_ran):
    for ratio in RATIOS:
        x = layout(torch.randn(shape) + ratio)
        weight, bias = torch.tensor([1.0, -0.7, 0.3]), torch.tensor([0.0, 0.5, -1.0])
        for with_parameters in (False, True):
            given = (weight, bias) if with_parameters else (None, None)
            y = batch_norm(x, None, None, *given, training=True)
            expected = reference.batch_norm(
                x.double().numpy(), *(None if v is None else v.double().numpy() for v in given)
            ).output
            assert kernels_ran.served(torch.float32)
            assert ulps(y, expected) <= FORWARD_ULP, (ratio, with_parameters)
            kernels_ran.clear()


def test_torchs_output_is_not():
    """The promise above is worth something: torch's own kernel breaks it."""
    x = torch.randn(16, 3, 17, 19) + 1e4
    expected = reference.batch_norm(x.double().numpy()).output
    assert ulps(F.batch_norm(x, None, None, training=True), expected) > 100 * FORWARD_ULP


@every_layout
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [7.0, 0.1, -100.0, 1e10, -1e30])
def test_constant_channel_gives_the_bias_exactly(value, dtype, layout, kernels_ran):
    if dtype is torch.float16 and abs(value) > 6e4:
        value = math.copysign(6e4, value)
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    x = torch.randn(6, 3, 5, 7).to(dtype)
    x[:, 1] = value
    x = layout(x).detach().requires_grad_()
    mean, var = torch.zeros(3, dtype=exact), torch.ones(3, dtype=exact)
    weight, bias = parameters(3, exact)
    y = batch_norm(x, mean, var, weight, bias, True, momentum=1.0)
    assert kernels_ran.served(dtype)
    assert torch.equal(y[:, 1], bias[1].detach().to(dtype).expand(6, 5, 7))
    assert mean[1].item() == x[0, 1, 0, 0].to(exact).item()
    assert var[1].item() == 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y, (x, weight, bias), torch.randn_like(y)))


@every_layout
@pytest.mark.parametrize("scale", [1e20, 1e30, 1e-20, 1e-40])
def test_huge_and_tiny_values_stay_finite(scale, layout, kernels_ran):
    x = layout((torch.randn(4, 3, 5, 7).double() * scale).float())
    y = batch_norm(x, None, None, training=True)
    expected = reference.batch_norm(x.double().numpy()).output
    assert kernels_ran.served(torch.float32)
    assert torch.isfinite(y).all()
    assert ulps(y, expected) <= FORWARD_ULP


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes_match_the_reference(dtype):
    signs = torch.randn(8, 3, 5).sign()
    for value, eps in ((60000.0, 1e-5), (2**-24 if dtype is torch.float16 else 1e-38, 1e-45)):
        x = (signs * value).to(dtype)
        y = batch_norm(x, None, None, training=True, eps=eps)
        assert_close(y, torch.from_numpy(reference.batch_norm(x.double().numpy(), eps=eps).output), dtype=dtype)


@every_layout
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 1, 0, 0), (3, 1, 2, 4)])
def test_a_bad_value_stays_in_its_channel(bad, place, layout):
    clean = torch.randn(4, 3, 5, 7)
    dirty = clean.clone()
    dirty[place] = bad
    dy, results = torch.randn(4, 3, 5, 7), []
    for x in (clean, dirty):
        x = layout(x).detach().requires_grad_()
        mean, var = torch.zeros(3), torch.ones(3)
        y = batch_norm(x, mean, var, training=True)
        results.append((y.detach(), torch.autograd.grad(y, x, dy)[0], mean[None], var[None]))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found[:, [0, 2]], expected[:, [0, 2]])
        assert not torch.isfinite(found[:, 1]).all()
    assert results[1][0][:, 1].isnan().all()


def exact_fill(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Data whose mean and variance float32 holds exactly, in any order of addition, with both.

    Neighbours lie at equal distances of few bits around a power of two, after the idea of oneDNN's driver.
    """
    samples, channels, *space = shape
    count = samples * math.prod(space)
    index = torch.arange(count)
    k = (index // 2 * 1637) % 32
    sign = 1 - 2 * (index % 2)
    centre = 2.0 ** (torch.arange(channels) % 7 - 2)
    values = centre[:, None] * (1 + sign * k / 32)
    x = values.reshape(channels, samples, *space).transpose(0, 1)
    return x.float(), centre.float(), (centre.double() ** 2 * k.double().square().mean() / 1024)


@every_layout
@pytest.mark.parametrize("shape", [(64, 9), (16, 9, 8), (8, 9, 4, 4), (2, 9, 4, 4, 8), (32, 9, 16, 16)], ids=str)
def test_exactly_representable_statistics_are_exact(shape, layout, kernels_ran):
    x, expected_mean, expected_var = exact_fill(shape)
    assert torch.equal(expected_var.float().double(), expected_var)
    mean, var = torch.zeros(9), torch.ones(9)
    batch_norm(layout(x), mean, var, training=True, momentum=1.0, unbiased=False)
    assert kernels_ran.served(torch.float32)
    assert torch.equal(mean, expected_mean)
    assert torch.equal(var, expected_var.float())


def test_layouts_agree_bit_for_bit_in_the_statistics_of_exact_data():
    x, _, _ = exact_fill((8, 9, 4, 4))
    found = []
    for layout in LAYOUTS:
        mean, var = torch.zeros(9), torch.ones(9)
        batch_norm(layout(x), mean, var, training=True, momentum=1.0)
        found.append(torch.cat([mean, var]))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_gradient_is_orthogonal_to_one_and_to_the_normalized_input():
    x = torch.randn(6, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    y = batch_norm(x, None, None, training=True, eps=1e-15)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    zeros = torch.zeros(3, dtype=torch.float64)
    assert dx.abs().max() > 0.01
    assert_close(dx.sum((0, 2, 3)), zeros, dtype=torch.float64)
    assert_close((dx * y).detach().sum((0, 2, 3)), zeros, dtype=torch.float64)


def test_result_does_not_depend_on_scale_shift_order_or_repetition():
    x = torch.randn(6, 3, 5, dtype=torch.float64)

    def normalized(x):
        return batch_norm(x, None, None, training=True, eps=1e-12)

    y, order = normalized(x), torch.randperm(6)
    assert_close(normalized(8 * x - 3), y, dtype=torch.float64)
    assert_close(normalized(x[order]), y[order], dtype=torch.float64)
    assert_close(normalized(x[:, [2, 0, 1]]), y[:, [2, 0, 1]], dtype=torch.float64)
    assert_close(normalized(torch.cat([x, x]))[:6], y, dtype=torch.float64)


def test_gradient_norm_follows_santurkars_identity():
    x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, dtype=torch.float64) + 0.5
    y = batch_norm(x, None, None, weight, training=True, eps=1e-14)
    dy, m = torch.randn_like(y), 30
    (dx,) = torch.autograd.grad(y, x, dy)
    var = x.detach().transpose(0, 1).flatten(1).var(1, correction=0)
    xhat = y.detach() / weight[:, None]
    inner = dy.square().sum((0, 2)) - dy.sum((0, 2)) ** 2 / m - (dy * xhat).sum((0, 2)) ** 2 / m
    assert_close(dx.square().sum((0, 2)), weight**2 / var * inner, dtype=torch.float64)


def test_weight_of_std_and_bias_of_mean_give_the_input_back():
    x = torch.randn(6, 3, 5, dtype=torch.float64) * 3 + 2
    values = x.transpose(0, 1).flatten(1)
    y = batch_norm(x, None, None, (values.var(1, correction=0) + 1e-5).sqrt(), values.mean(1), training=True)
    assert_close(y, x, dtype=torch.float64)


def test_input_is_not_written():
    x = torch.randn(4, 3, 5)
    kept = x.clone()
    with torch.no_grad():
        batch_norm(x, torch.zeros(3), torch.ones(3), training=True)
    assert torch.equal(x, kept)


def test_double_backward_reaches_an_input_that_is_copied_for_the_kernels():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    v, found = torch.randn(3, 4, 5, dtype=torch.float64).transpose(0, 1), []
    for given in (x.clone(), x.transpose(0, 1).contiguous().transpose(0, 1)):
        given.requires_grad_()
        y = batch_norm(given, None, None, training=True)
        (dx,) = torch.autograd.grad(y, given, torch.cos(y), create_graph=True)
        found.append(torch.autograd.grad((dx * v).sum(), given)[0])
    assert found[0].abs().max() > 0.01
    assert_close(found[1], found[0], dtype=torch.float64)
