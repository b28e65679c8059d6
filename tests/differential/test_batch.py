"""Batch norm of every type, layout, activation and form against the formula in float64 torch operations."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as torch_functional

from normkit import functional as F
from normkit import layers
from tolerances import assert_close

from .draws import LAYOUTS, SEEDS, SHAPES, VALUES, bounded, laid_out, lost_to_the_mean, random

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": torch_functional.relu,
    "relu6": torch_functional.relu6,
    "leaky_relu": torch_functional.leaky_relu,
    "silu": torch_functional.silu,
}
EPS = 1e-5
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,)}
BATCH_NORMS = {2: layers.BatchNorm1d, 3: layers.BatchNorm1d, 4: layers.BatchNorm2d, 5: layers.BatchNorm3d}
FUSED = {2: layers.BatchNormAct1d, 3: layers.BatchNormAct1d, 4: layers.BatchNormAct2d, 5: layers.BatchNormAct3d}


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(1, -1, *(1 for _ in x.shape[2:]))


def formula(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """SPEC A1, in float64, about a value of each channel, so that a large mean costs no digits."""
    about = nearby(x)
    deviations = (x - per_channel(about, x)) - per_channel(mean - about, x)
    return deviations * per_channel((var + eps).rsqrt() * weight, x) + per_channel(bias, x)


def nearby(x: Tensor) -> Tensor:
    """One value of each channel."""
    return x.detach().transpose(0, 1).flatten(1)[:, 0]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    about = nearby(x)
    values = x.transpose(0, 1).flatten(1) - about[:, None]
    mean = values.mean(1)
    return mean + about, ((values - mean[:, None]) ** 2).mean(1)


def away_from_kinks(dy: Tensor, z: Tensor, activation: str | None, dtype: torch.dtype) -> Tensor:
    """Ask for no gradient where the slope hangs on the last digit of z."""
    margin = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}[dtype]
    for kink in KINKS.get(activation or "", ()):
        dy = dy.masked_fill((z - kink).abs() < margin * max(1.0, z.abs().max().item() / 8), 0.0)
    return dy


def compare(found: Tensor, expected: Tensor, unit: Tensor | float, dtype: torch.dtype, what: str) -> None:
    """Compare in units of what the terms are before they cancel."""
    assert found.dtype is dtype or what.startswith(("dweight", "dbias", "running")), what
    assert_close(found.double() / unit, expected / unit, dtype=dtype, what=what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@bounded
@given(
    values=VALUES, shape=SHAPES, layout=LAYOUTS, cotangent_layout=LAYOUTS, seed=SEEDS, training=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)), with_residual=st.booleans(), fused=st.booleans(),
    momentum=st.sampled_from([0.0, 0.1, 0.37, 1.0, None]), unbiased=st.booleans(),
)  # fmt: skip
def test_layers_agree_with_the_formula(
    dtype, values, shape, layout, cotangent_layout, seed, training, activation, with_residual, fused, momentum, unbiased
):
    values = values.within(dtype)
    x = values.tensor(shape).to(dtype)
    residual = random(shape, seed + 1, dtype) if fused and with_residual else None
    channels = shape[1]
    if fused:
        layer = FUSED[len(shape)](channels, activation=activation, momentum=momentum, unbiased=unbiased)
    else:
        activation, layer = None, BATCH_NORMS[len(shape)](channels, momentum=momentum, unbiased=unbiased)
    layer = (layer.double() if dtype is torch.float64 else layer).train(training)
    state = layer.state_dict(keep_vars=True)
    with torch.no_grad():
        state["weight"].copy_(random((channels,), seed + 2))
        state["bias"].copy_(random((channels,), seed + 3))
        state["running_mean"].copy_(x.double().mean() + random((channels,), seed + 4))
        state["running_var"].copy_(random((channels,), seed + 5).exp() * x.double().var())
    before = {name: value.detach().clone().double() for name, value in state.items()}

    wide = x.double().requires_grad_()
    wide_residual = None if residual is None else residual.double().requires_grad_()
    weight, bias = before["weight"].clone().requires_grad_(), before["bias"].clone().requires_grad_()
    mean, var = moments(wide) if training else (before["running_mean"], before["running_var"])
    z = formula(wide, mean, var, weight, bias, EPS)
    z = z if wide_residual is None else z + wide_residual
    expected = ACTIVATIONS[activation](z)
    dy = away_from_kinks(random(shape, seed + 6, dtype), z.detach(), activation, dtype)

    leaf = laid_out(x, layout).detach().requires_grad_()
    leaves = [leaf, state["weight"], state["bias"]]
    if residual is None:
        y = layer(leaf)
    else:
        leaves.append(laid_out(residual, layout).detach().requires_grad_())
        y = layer(leaf, leaves[-1])
    gradients = torch.autograd.grad(y, leaves, laid_out(dy, cotangent_layout))
    wide_leaves = [wide, weight, bias] + ([] if wide_residual is None else [wide_residual])
    wanted = torch.autograd.grad(expected, wide_leaves, dy.double())

    rstd = per_channel((var.detach() + EPS).rsqrt(), x)
    lost = lost_to_the_mean(x, rstd)
    scale = max(1.0, weight.detach().abs().max().item(), bias.detach().abs().max().item()) * lost
    compare(y.detach(), expected.detach(), scale, dtype, "output")
    steep = (rstd * per_channel(weight.detach().abs(), x)).clamp(min=1e-30) * dy.double().abs().max().clamp(min=1e-30)
    compare(gradients[0], wanted[0], steep * lost, dtype, "dx")
    count = x.numel() // channels
    largest = max(1.0, z.detach().abs().max().item()) * count**0.5 * lost
    compare(gradients[1], wanted[1], largest, dtype, "dweight")
    compare(gradients[2], wanted[2], largest, dtype, "dbias")
    if residual is not None:
        compare(gradients[3], wanted[3], 1.0, dtype, "dresidual")

    rate = (1.0 if momentum is None else momentum) if training else 0.0
    stored = moments(x.double())[1] * (count / (count - 1) if unbiased else 1.0)
    unit = x.double().abs().max().item() + 1.0
    for name, new, size in (("running_mean", moments(x.double())[0], unit), ("running_var", stored, unit**2)):
        moved = before[name] if rate == 0.0 else before[name] * (1 - rate) + new * rate
        kept = torch.float64 if dtype is torch.float64 else torch.float32
        compare(state[name], moved, size, kept, name)
    assert state["num_batches_tracked"] == int(training)


@bounded
@given(values=VALUES, shape=SHAPES, layout=st.sampled_from(["contiguous", "channels_last", "unaligned"]), seed=SEEDS,
       activation=st.sampled_from([None, "leaky_relu"]), double=st.booleans())  # fmt: skip
def test_in_place_equals_out_of_place(values, shape, layout, seed, activation, double):
    dtype = torch.float64 if double else torch.float32
    x = values.tensor(shape).to(dtype)
    weight = random((shape[1],), seed, dtype).sign() * (random((shape[1],), seed, dtype).abs() + 0.5)
    bias, dy = random((shape[1],), seed + 1, dtype), random(shape, seed + 2, dtype)
    wide, gamma, beta = (value.double().requires_grad_() for value in (x, weight, bias))
    z = formula(wide, *moments(wide), gamma, beta, 1e-3)
    dy = away_from_kinks(dy, z.detach(), activation, dtype)
    wanted = torch.autograd.grad(ACTIVATIONS[activation](z), [wide, gamma, beta], dy.double())

    source = x.clone().requires_grad_()
    weight.requires_grad_()
    bias.requires_grad_()
    # Not a leaf and not a view: what a layer before would hand over.
    given_away = laid_out(source, layout) * 1.0
    if layout == "unaligned":
        memory = torch.empty(x.numel() + 1, dtype=dtype)
        given_away = memory.set_(memory.untyped_storage(), 1, shape).copy_(source)
    y = F.batch_norm(given_away, None, None, weight, bias, training=True, eps=1e-3, activation=activation, inplace=True)
    assert y.data_ptr() == given_away.data_ptr()
    gradients = torch.autograd.grad(y, [source, weight, bias], dy)
    rstd = per_channel((moments(x.double())[1] + 1e-3).rsqrt(), x)
    scale = rstd * per_channel(weight.detach().double().abs(), x) * dy.double().abs().max().clamp(min=1e-30)
    # The normalized input is had back from the output, which costs as many digits as bias and weight differ by.
    lost = 8.0 * max(1.0, (bias.detach().abs() / weight.detach().abs()).max().item()) * lost_to_the_mean(x, rstd)
    compare(gradients[0], wanted[0], scale * lost, dtype, "dx")
    size = max(1.0, z.detach().abs().max().item()) * (x.numel() / shape[1]) ** 0.5 * lost
    compare(gradients[1], wanted[1], size, dtype, "dweight")
    compare(gradients[2], wanted[2], size, dtype, "dbias")


@bounded
@given(values=VALUES, shape=SHAPES, layout=LAYOUTS, seed=SEEDS, activation=st.sampled_from([None, "silu"]))
def test_second_order_agrees_with_the_formula(values, shape, layout, seed, activation):
    x, dy, v = values.tensor(shape), random(shape, seed), random(shape, seed + 1)
    weight, bias = random((shape[1],), seed + 2), random((shape[1],), seed + 3)
    found = []
    for ours in (True, False):
        leaf = (laid_out(x, layout) if ours else x.clone()).detach().requires_grad_()
        gamma, beta, cotangent = (value.clone().requires_grad_() for value in (weight, bias, dy))
        if ours:
            y = F.batch_norm(leaf, None, None, gamma, beta, training=True, eps=1e-3, activation=activation)
        else:
            y = ACTIVATIONS[activation](formula(leaf, *moments(leaf), gamma, beta, 1e-3))
        dx, dweight = torch.autograd.grad(y, [leaf, gamma], cotangent, create_graph=True)
        scalar = (dx * v).sum() + dweight.square().sum()
        found.append(torch.autograd.grad(scalar, [leaf, gamma, cotangent]))
    lost = 8 * lost_to_the_mean(x, (moments(x)[1] + 1e-3).rsqrt())
    for what, ours, expected in zip(("dx", "dweight", "ddy"), *found, strict=True):
        compare(ours, expected, expected.abs().max().clamp(min=1.0).item() * lost, torch.float64, what)


@bounded
@given(values=VALUES, shape=SHAPES, layout=LAYOUTS, training=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_copies_layouts_and_threads_give_the_same_bits(values, shape, layout, training, dtype):
    x = laid_out(values.within(dtype).tensor(shape).to(dtype), layout)
    layer = BATCH_NORMS[len(shape)](shape[1]).to(torch.float64 if dtype is torch.float64 else torch.float32)
    layer.train(training)
    twin = copy.deepcopy(layer)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = layer(x)
        torch.set_num_threads(3)
        assert torch.equal(twin(x), alone)
    finally:
        torch.set_num_threads(threads)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
