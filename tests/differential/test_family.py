"""The rest of the family on random shapes: norms per sample against the formula in float64, others by the reference."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normkit import functional as F
from normkit import reference as R
from normkit.reference import Running
from tolerances import assert_close

from .draws import LAYOUTS, SEEDS, VALUES, Values, bounded, laid_out, lost_to_the_mean, random
from .test_batch import DTYPES, moments

IMAGES = st.one_of(
    st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 4, 6, 17, 24]), st.integers(1, 13), st.integers(2, 13)),
    st.tuples(st.integers(1, 5), st.sampled_from([2, 6, 40]), st.integers(2, 31)),
    st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 4]), st.integers(47, 71), st.integers(43, 67)),
)
ROWS = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(2, 70)),
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(2, 300)),
    st.tuples(st.integers(1, 3), st.integers(2049, 4200)),
)


def standardized(x: Tensor, axes: tuple[int, ...], eps: float, *, centred: bool = True) -> tuple[Tensor, Tensor]:
    """The normalized values and rstd in float64, about one value of every cell so that a large mean costs no digits."""
    if centred:
        about = x.detach()
        for axis in axes:
            about = about.narrow(axis, 0, 1)
        x = x - about
        x = x - x.mean(axes, keepdim=True)
    rstd = (x.square().mean(axes, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


def broadcast(value: Tensor, x: Tensor, per_channel: bool) -> Tensor:
    return value.reshape(1, -1, *(1 for _ in x.shape[2:])) if per_channel else value


@dataclass(frozen=True)
class PerSample:
    """A norm with statistics per sample: ours, and the formula's view of x with its axes."""

    call: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    view: Callable[[Tensor, int], Tensor]
    axes: Callable[[Tensor], tuple[int, ...]]
    images: bool
    centred: bool = True


def last(x: Tensor) -> tuple[int, ...]:
    return (x.dim() - 1,)


PER_SAMPLE = {
    "layer": PerSample(
        lambda x, w, b, g: F.layer_norm(x, x.shape[-1:], w, b, eps=1e-3), lambda x, g: x, last, images=False
    ),
    "rms": PerSample(
        lambda x, w, b, g: F.rms_norm(x, x.shape[-1:], w, eps=1e-3), lambda x, g: x, last, images=False, centred=False
    ),
    "group": PerSample(
        lambda x, w, b, g: F.group_norm(x, g, w, b, eps=1e-3),
        lambda x, g: x.reshape(x.shape[0], g, x.shape[1] // g, *x.shape[2:]),
        lambda x: tuple(range(2, x.dim() + 1)),
        images=True,
    ),
    "instance": PerSample(
        lambda x, w, b, g: F.instance_norm(x, weight=w, bias=b, eps=1e-3),
        lambda x, g: x,
        lambda x: tuple(range(2, x.dim())),
        images=True,
    ),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@bounded
@given(data=st.data(), values=VALUES, layout=LAYOUTS, cotangent_layout=LAYOUTS, seed=SEEDS, affine=st.booleans())
def test_norms_per_sample_agree_with_the_formula(name, dtype, data, values, layout, cotangent_layout, seed, affine):
    norm = PER_SAMPLE[name]
    shape = data.draw(IMAGES if norm.images else ROWS)
    groups = data.draw(st.sampled_from([g for g in (1, 2, shape[1]) if shape[1] % g == 0])) if norm.images else 1
    x = values.within(dtype).tensor(shape).to(dtype)
    size = shape[1:2] if norm.images else shape[-1:]
    weight, bias = (random(size, seed + k, dtype) if affine else None for k in (1, 2))
    dy = random(shape, seed + 3, dtype)

    wide = x.double().requires_grad_()
    xhat, rstd = standardized(norm.view(wide, groups), norm.axes(x), 1e-3, centred=norm.centred)
    rstd = rstd.expand_as(xhat).reshape(shape).detach()
    gamma = torch.ones(size).double() if weight is None else weight.double()
    beta = torch.zeros(size).double() if bias is None or not norm.centred else bias.double()
    gamma.requires_grad_()
    beta.requires_grad_()
    expected = xhat.reshape(shape) * broadcast(gamma, x, norm.images) + broadcast(beta, x, norm.images)
    wanted = torch.autograd.grad(expected, [wide, gamma, beta], dy.double())

    leaf = laid_out(x, layout).detach().requires_grad_()
    parameters = [value.requires_grad_() for value in (weight, bias) if value is not None]
    y = norm.call(leaf, weight, bias, groups)
    leaves = [leaf, *parameters][: 3 if norm.centred else 2]
    gradients = torch.autograd.grad(y, leaves, laid_out(dy, cotangent_layout))
    lost = lost_to_the_mean(x, rstd) if norm.centred else 1.0
    scale = max(1.0, gamma.detach().abs().max().item(), beta.detach().abs().max().item()) * lost
    assert y.dtype is dtype
    assert_close(y.detach().double() / scale, expected.detach() / scale, dtype=dtype, what="output")
    steep = rstd * gamma.detach().abs().max().clamp(min=1e-30) * dy.double().abs().max().clamp(min=1e-30)
    steep = steep * lost
    assert_close(gradients[0].double() / steep, wanted[0] / steep, dtype=dtype, what="dx")
    summed = x.numel() / gamma.numel()
    unit = max(1.0, xhat.detach().abs().max().item()) * summed**0.5 * lost
    for what, ours, theirs in zip(("dweight", "dbias"), gradients[1:], wanted[1:], strict=False):
        assert_close(ours.double() / unit, theirs / unit, dtype=dtype, what=what)


@pytest.mark.parametrize("name", PER_SAMPLE)
@bounded
@given(data=st.data(), values=VALUES, layout=LAYOUTS, seed=SEEDS)
def test_second_order_per_sample_agrees_with_the_formula(name, data, values, layout, seed):
    norm = PER_SAMPLE[name]
    shape = data.draw(IMAGES if norm.images else ROWS)
    groups = data.draw(st.sampled_from([g for g in (1, 2, shape[1]) if shape[1] % g == 0])) if norm.images else 1
    x, dy, v = values.tensor(shape), random(shape, seed), random(shape, seed + 1)
    weight = random(shape[1:2] if norm.images else shape[-1:], seed + 2)
    found, lost = [], 8.0
    for ours in (True, False):
        leaf = (laid_out(x, layout) if ours else x.clone()).detach().requires_grad_()
        gamma, cotangent = weight.clone().requires_grad_(), dy.clone().requires_grad_()
        if ours:
            y = norm.call(leaf, gamma, None, groups)
        else:
            xhat, rstd = standardized(norm.view(leaf, groups), norm.axes(x), 1e-3, centred=norm.centred)
            lost *= lost_to_the_mean(x, rstd.detach()) if norm.centred else 1.0
            y = xhat.reshape(shape) * broadcast(gamma, x, norm.images)
        dx, dweight = torch.autograd.grad(y, [leaf, gamma], cotangent, create_graph=True)
        found.append(torch.autograd.grad((dx * v).sum() + dweight.square().sum(), [leaf, gamma, cotangent]))
    for what, ours, expected in zip(("dx", "dweight", "ddy"), *found, strict=True):
        unit = expected.abs().max().clamp(min=1.0) * lost
        assert_close(ours / unit, expected / unit, dtype=torch.float64, what=what)


def _kept(seed: int, channels: int) -> tuple[Tensor, Tensor]:
    return random((channels,), seed), random((channels,), seed + 1).exp()


def _renorm(x: Tensor, w: Tensor, b: Tensor, seed: int) -> tuple[Tensor, object, Callable]:
    mean, var = _kept(seed, x.shape[1])
    running = Running(mean=mean.numpy().copy(), var=var.numpy().copy())
    judge = R.batch_renorm(x.detach().numpy(), running, w.numpy(), b.numpy(), r_max=1.5, d_max=0.5, eps=1e-3)
    return (
        F.batch_renorm(x, mean, var, w, b, training=True, eps=1e-3, r_max=1.5, d_max=0.5),
        judge,
        R.batch_renorm_backward,
    )


def _ghost(x: Tensor, w: Tensor, b: Tensor, seed: int) -> tuple[Tensor, object, Callable]:
    judge = R.ghost_batch_norm(x.detach().numpy(), 2, w.numpy(), b.numpy(), eps=1e-3)
    y = F.ghost_batch_norm(x, None, None, w, b, training=True, eps=1e-3, ghost_size=2)
    return y, judge, R.ghost_batch_norm_backward


def _masked(x: Tensor, w: Tensor, b: Tensor, seed: int) -> tuple[Tensor, object, Callable]:
    mask = random((x.shape[0], x.shape[2]), seed) > -0.7
    mask[0, :2] = True
    judge = R.masked_batch_norm(x.detach().numpy(), mask.numpy(), w.numpy(), b.numpy(), eps=1e-3)
    return F.masked_batch_norm(x, mask, None, None, w, b, training=True, eps=1e-3), judge, R.masked_batch_norm_backward


def _whitening(x: Tensor, w: Tensor, b: Tensor, seed: int) -> tuple[Tensor, object, Callable]:
    judge = R.whitening_batch_norm(x.detach().numpy(), w.numpy(), b.numpy(), eps=1e-1)
    y = F.whitening_batch_norm(x, None, None, w, b, training=True, eps=1e-1)
    return y, judge, R.whitening_batch_norm_backward


def _response(x: Tensor, w: Tensor, b: Tensor, seed: int) -> tuple[Tensor, object, Callable]:
    judge = R.local_response_norm(x.detach().numpy(), 3, alpha=2.0, beta=0.75, k=1.0)
    return F.local_response_norm(x, 3, alpha=2.0, beta=0.75, k=1.0), judge, R.local_response_norm_backward


FAMILY = {"renorm": _renorm, "ghost": _ghost, "masked": _masked, "whitening": _whitening, "response": _response}


@pytest.mark.parametrize("name", FAMILY)
@bounded
@given(
    shape=st.tuples(st.integers(2, 7), st.integers(1, 6), st.integers(2, 19)), layout=LAYOUTS, seed=SEEDS,
    kind=st.sampled_from(["normal", "levels", "outlier"]), ratio=st.sampled_from([0.0, 1.0, -30.0]),
)  # fmt: skip
def test_the_family_agrees_with_the_reference(name, shape, layout, seed, kind, ratio):
    x = laid_out(Values(seed, kind, ratio, 0).tensor(shape), layout).detach().requires_grad_()
    weight, bias = random(shape[1:2], seed + 1), random(shape[1:2], seed + 2)
    y, judge, backward = FAMILY[name](x, weight, bias, seed + 3)
    dy = random(shape, seed + 5)
    (dx,) = torch.autograd.grad(y, x, dy)
    scale = max(1.0, float(np.abs(judge.output).max()))
    assert_close(y.detach() / scale, torch.from_numpy(judge.output) / scale, dtype=torch.float64, what="output")
    expected = torch.from_numpy(backward(dy.numpy(), judge).dx)
    # The unit of the terms before they cancel, 1 / std of the tightest channel.
    unit = max(1.0, float((moments(x.detach())[1] + 1e-3).rsqrt().max()), expected.abs().max().item()) * 8
    assert_close(dx / unit, expected / unit, dtype=torch.float64, what="dx")
