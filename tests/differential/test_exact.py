"""float64 against exact rationals: channels of few values, forward, backward, second order, running averages."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from normkit import functional as F
from normkit import layers
from tolerances import FORWARD_ULP_FLOAT64, assert_close

from . import rationals
from .draws import bounded, random

# Finite, and neither so large nor so small that a square leaves float64's range, which is another test's subject.
NUMBERS = st.one_of(
    st.integers(-4, 4).map(float),
    st.floats(-1e6, 1e6, allow_subnormal=False),
    st.floats(0.0, 1e-6, exclude_min=True, allow_subnormal=False),
)
EPS = st.sampled_from([1e-5, 1e-3, 0.3, 1e-12])
MOMENTA = st.one_of(st.sampled_from([0.0, 1.0, 0.1, 0.5]), st.floats(0.0, 1.0))


@dataclass(frozen=True)
class Norm:
    """One norm of a tensor (2, 2, S) in which every cell of four, two or one runs shares statistics."""

    call: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    cells: Callable[[Tensor], Tensor]
    parameters: tuple[int, ...]
    centred: bool = True


def _by_channel(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


NORMS = {
    "batch": Norm(lambda x, w, b, eps: F.batch_norm(x, None, None, w, b, training=True, eps=eps), _by_channel, (2,)),
    "instance": Norm(
        lambda x, w, b, eps: F.instance_norm(x, weight=w, bias=b, eps=eps), lambda x: x.flatten(0, 1), (2,)
    ),
    "group": Norm(lambda x, w, b, eps: F.group_norm(x, 1, w, b, eps=eps), lambda x: x.flatten(1), (2,)),
    "layer": Norm(lambda x, w, b, eps: F.layer_norm(x, x.shape[1:], w, b, eps=eps), lambda x: x.flatten(1), (2, -1)),
    "rms": Norm(
        lambda x, w, b, eps: F.rms_norm(x, x.shape[1:], w, eps=eps), lambda x: x.flatten(1), (2, -1), centred=False
    ),
}


def spread(value: Tensor, x: Tensor) -> Tensor:
    """A weight or bias, one for every element of x."""
    return (value[:, None] if value.dim() == 1 else value).expand_as(x)


def rounding(values: list[Fraction]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@bounded
@given(data=st.data(), positions=st.sampled_from([2, 3, 5]), eps=EPS, seed=st.integers(0, 2**16))
def test_float64_is_the_rounding_of_the_exact_numbers(name, channels_last, data, positions, eps, seed):
    norm = NORMS[name]
    values = data.draw(st.lists(NUMBERS, min_size=4 * positions, max_size=4 * positions))
    x = torch.tensor(values, dtype=torch.float64).view(2, 2, positions)
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    shape = tuple(positions if size < 0 else size for size in norm.parameters)
    weight, bias = random(shape, seed), random(shape, seed + 1) if norm.centred else None
    dy, v = random(x.shape, seed + 2), random(x.shape, seed + 3)

    leaf, gamma = x.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone().requires_grad_()
    beta = None if bias is None else bias.clone().requires_grad_()
    y = norm.call(leaf, gamma, beta, eps)
    wanted = [leaf, gamma] if beta is None else [leaf, gamma, beta]
    gradients = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    (dx,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
    (second,) = torch.autograd.grad(dx, leaf, v)

    dxhat = dy * spread(weight, x)
    cells = zip(*(norm.cells(value).tolist() for value in (x, dxhat, v)), strict=True)
    steps = []
    for k, (values_of_cell, g, direction) in enumerate(cells):
        step = rationals.normalize(rationals.exact(values_of_cell), Fraction(eps), centred=norm.centred)
        # dxhat was rounded once where it was made, in the test as in the code under test: it is taken as it is.
        g, direction = rationals.exact(g), rationals.exact(direction)
        found = {"dx": norm.cells(gradients[0])[k], "second": norm.cells(second)[k]}
        expected = {"dx": rationals.input_gradient(step, g)}
        expected["second"] = rationals.directional_derivative(step, g, direction)
        for what, value in found.items():
            # In units of what the terms are before they cancel.
            unit = float(step.rstd) * max(map(abs, map(float, g)))
            unit *= float(step.rstd) * max(map(abs, map(float, direction))) * len(g) if what == "second" else 1.0
            unit = max(unit, 1e-300)
            assert_close(
                value / unit, rounding([e / Fraction(unit) for e in expected[what]]), dtype=torch.float64, what=what
            )
        steps.append(step)

    # The affine map of the exact normalized values, to the promised units in the last place.
    xhat = torch.stack([rounding(step.xhat) for step in steps])
    offset = torch.zeros_like(x) if bias is None else spread(bias, x)
    for k, step in enumerate(steps):
        scales, offsets, ys = (norm.cells(value)[k].tolist() for value in (spread(weight, x), offset, y.detach()))
        for h, scale, shift, result in zip(step.xhat, scales, offsets, ys, strict=True):
            exact = Fraction(scale) * h + Fraction(shift)
            unit = np.spacing(max(1.0, abs(float(exact)), abs(scale * float(h)), abs(scale)))
            assert abs(Fraction(result) - exact) <= FORWARD_ULP_FLOAT64 * Fraction(float(unit)), (
                f"y is {result}, not {float(exact)}"
            )
    assert_close(norm.cells(y.detach()), xhat * norm.cells(spread(weight, x)) + norm.cells(offset), dtype=torch.float64)


@bounded
@given(
    batches=st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=4),
    momentum=st.one_of(st.none(), MOMENTA),
    unbiased=st.booleans(),
    kind=st.sampled_from(["vectors", "contiguous", "channels_last"]),
)
@example(batches=[[0.0, 1e-9, 2e-9]], momentum=1.0, unbiased=True, kind="vectors")
@example(batches=[[0.0, 1e-9, 2e-9]], momentum=None, unbiased=False, kind="channels_last")
def test_running_statistics_are_the_exact_averages_rounded(batches, momentum, unbiased, kind):
    layer = layers.BatchNorm1d(1, momentum=momentum, unbiased=unbiased).double()
    mean, var, sizes = Fraction(0), Fraction(1), [Fraction(0), Fraction(1)]
    for number, values in enumerate(batches, 1):
        x = torch.tensor(values, dtype=torch.float64)[:, None]
        if kind != "vectors":
            x = x[..., None].expand(3, 1, 2)
            x = x.contiguous() if kind == "contiguous" else x.transpose(1, 2).contiguous().transpose(1, 2)
        layer(x)
        cell = rationals.exact(x.flatten().tolist())
        step = rationals.normalize(cell, Fraction(1))
        stored = step.var * len(cell) / (len(cell) - 1) if unbiased else step.var
        rate = Fraction(1, number) if momentum is None else Fraction(momentum)
        mean, var = mean + (step.mean - mean) * rate, var + (stored - var) * rate
        # Each step rounds a few times, in units of the terms that it adds.
        largest = max(map(abs, cell))
        sizes = [size * (1 - rate) + new * rate for size, new in zip(sizes, (largest, largest**2), strict=True)]
        averages = ((layer.running_mean, mean), (layer.running_var, var))
        for (found, expected), size in zip(averages, sizes, strict=True):
            unit = Fraction(float(np.spacing(max(float(abs(expected)), float(size), 1e-300))))
            assert abs(Fraction(found.item()) - expected) <= 8 * number * unit, f"{found.item()} for {float(expected)}"
    assert layer.num_batches_tracked == len(batches)
