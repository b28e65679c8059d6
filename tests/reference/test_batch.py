"""Batch normalization in float64 against closed forms, 50 digits, finite differences and torch."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from normkit.errors import ArgumentError, DtypeError, ShapeError
from normkit.reference import (
    batch_norm,
    batch_norm_backward,
    batch_norm_double_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
)
from tolerances import FINITE_DIFFERENCE, RELATIVE

from .oracle import central_difference, close, exact_batch_norm, exact_gradient, random_array

SHAPES = [(8, 5), (7, 3, 11), (4, 2, 5, 3), (2, 3, 4, 3, 5), (1, 3, 2, 1), (5, 1, 1, 7)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def by_channel(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)


def test_output_of_three_values_is_the_closed_form() -> None:
    step = batch_norm([[1.0], [2.0], [3.0]], [2.0], [5.0], eps=0.0)
    root = np.sqrt(2 / 3)
    close(step.mean, [2.0])
    close(step.var, [2 / 3])
    close(step.output.ravel(), [5 - 2 / root, 5, 5 + 2 / root])


def test_input_gradient_of_three_values_is_the_closed_form() -> None:
    # x = (-1, 0, 1) gives xhat = sqrt(3/2) x; dx = r (dy - mean dy - xhat mean(dy xhat)) by hand for dy = (1, 0, 0)
    step = batch_norm([[-1.0], [0.0], [1.0]], eps=0.0)
    root = np.sqrt(3 / 2)
    close(batch_norm_backward([[1.0], [0.0], [0.0]], step).dx.ravel(), [root / 6, -root / 3, root / 6])


@shapes
def test_output_has_mean_bias_and_variance_weight_squared(shape: tuple[int, ...]) -> None:
    channels = shape[1]
    weight, bias = random_array(channels, seed=1), random_array(channels, seed=2)
    values = by_channel(batch_norm(random_array(*shape), weight, bias, eps=0.0).output)
    close(values.mean(axis=1), bias)
    close(values.var(axis=1), weight**2)


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "mean-1e4"])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_forward_and_backward_agree_with_fifty_digits(offset: float, eps: float) -> None:
    x, dy = random_array(13, 1) + offset, random_array(13, 1, seed=1)
    step = batch_norm(x, [1.7], [-0.3], eps=eps)
    found = batch_norm_backward(dy, step)
    expected = exact_batch_norm(x.ravel(), 1.7, -0.3, eps)
    close(step.output.ravel(), [float(value) for value in expected], "output")
    cotangent = dy.ravel().tolist()
    by_x = exact_gradient(lambda values: exact_batch_norm(values, 1.7, -0.3, eps), x.ravel(), cotangent)
    by_weight = exact_gradient(lambda one: exact_batch_norm(x.ravel(), one[0], -0.3, eps), [1.7], cotangent)
    close(found.dx.ravel(), by_x, "dx")
    close(found.dweight, by_weight, "dweight")
    close(found.dbias, [sum(cotangent)], "dbias")


@shapes
def test_every_gradient_agrees_with_finite_differences(shape: tuple[int, ...]) -> None:
    x, dy = random_array(*shape), random_array(*shape, seed=1)
    weight, bias = random_array(shape[1], seed=2), random_array(shape[1], seed=3)
    found = batch_norm_backward(dy, batch_norm(x, weight, bias, eps=0.1))

    def loss(x: np.ndarray = x, weight: np.ndarray = weight, bias: np.ndarray = bias) -> float:
        return float((batch_norm(x, weight, bias, eps=0.1).output * dy).sum())

    np.testing.assert_allclose(found.dx, central_difference(lambda v: loss(x=v), x), atol=FINITE_DIFFERENCE)
    np.testing.assert_allclose(
        found.dweight, central_difference(lambda v: loss(weight=v), weight), atol=FINITE_DIFFERENCE
    )
    np.testing.assert_allclose(found.dbias, central_difference(lambda v: loss(bias=v), bias), atol=FINITE_DIFFERENCE)


def test_intermediates_are_the_gradients_they_are_named_after() -> None:
    x, dy, weight, eps = random_array(6, 2), random_array(6, 2, seed=1), random_array(2, seed=2), 0.1
    step = batch_norm(x, weight, eps=eps)
    found = batch_norm_backward(dy, step)

    def loss(xhat: np.ndarray) -> float:
        return float((xhat * weight * dy).sum())

    def by_statistics(mean: np.ndarray, var: np.ndarray) -> float:
        return loss((x - mean) / np.sqrt(var + eps))

    def by_mean(mean: np.ndarray) -> float:
        return by_statistics(mean, ((x - mean) ** 2).mean(axis=0))  # the variance moves with the mean

    np.testing.assert_allclose(found.dxhat, central_difference(loss, step.xhat), atol=FINITE_DIFFERENCE)
    slope = central_difference(lambda var: by_statistics(step.mean, var), step.var)
    np.testing.assert_allclose(found.dvar, slope, atol=FINITE_DIFFERENCE)
    np.testing.assert_allclose(found.dmean, central_difference(by_mean, step.mean), atol=FINITE_DIFFERENCE)


@shapes
def test_input_gradient_is_the_simplified_line(shape: tuple[int, ...]) -> None:
    dy, weight = random_array(*shape, seed=1), random_array(shape[1], seed=2)
    step = batch_norm(random_array(*shape), weight)
    axes = (0, *range(2, len(shape)))
    broadcast = (1, -1, *(1 for _ in shape[2:]))
    centred = dy - dy.mean(axis=axes, keepdims=True) - step.xhat * (dy * step.xhat).mean(axis=axes, keepdims=True)
    close(batch_norm_backward(dy, step).dx, (weight * step.rstd).reshape(broadcast) * centred)


@example(samples=1, channels=4, space=[], seed=655, shifted=True)  # two close values far from zero
@given(
    st.integers(1, 6), st.integers(1, 4), st.lists(st.integers(1, 4), max_size=3), st.integers(0, 2**16), st.booleans()
)
def test_input_gradient_is_orthogonal_to_ones_and_to_xhat(
    samples: int, channels: int, space: list[int], seed: int, shifted: bool
) -> None:
    shape = (samples + 1, channels, *space)
    x, dy = random_array(*shape, seed=seed) + 100 * shifted, random_array(*shape, seed=seed + 1)
    step = batch_norm(x, eps=0.0)
    dx = by_channel(batch_norm_backward(dy, step).dx)
    size = np.abs(dx).sum(axis=1) + np.abs(by_channel(dy)).sum(axis=1) * step.rstd
    assert (np.abs(dx.sum(axis=1)) <= RELATIVE[torch.float64] * size).all()
    along = (dx * by_channel(step.xhat)).sum(axis=1)
    assert (np.abs(along) <= RELATIVE[torch.float64] * size * np.abs(step.xhat).max()).all()


@shapes
def test_identity_is_recovered_with_weight_std_and_bias_mean(shape: tuple[int, ...]) -> None:
    x = random_array(*shape) * 3 + 7
    step = batch_norm(x)
    close(batch_norm(x, np.sqrt(step.var + 1e-5), step.mean).output, x)


def test_identity_is_recovered_to_the_last_bit_where_arithmetic_is_exact() -> None:
    x = np.array([[-3.0], [-1.0], [1.0], [3.0]]) + 8
    step = batch_norm(x, eps=11.0)  # var = 5, so the root is 4
    assert batch_norm(x, [4.0], step.mean, eps=11.0).output.tolist() == x.tolist()


@shapes
def test_gradients_agree_with_torch(shape: tuple[int, ...]) -> None:
    x, dy = random_array(*shape), random_array(*shape, seed=1)
    weight, bias = random_array(shape[1], seed=2), random_array(shape[1], seed=3)
    step = batch_norm(x, weight, bias)
    leaves = [torch.tensor(value, requires_grad=True) for value in (x, weight, bias)]
    output = torch.nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
    expected = torch.autograd.grad(output, leaves, torch.tensor(dy))
    found = batch_norm_backward(dy, step)
    close(step.output, output.detach(), "output")
    for name, one in zip(("dx", "dweight", "dbias"), expected, strict=True):
        close(getattr(found, name), one, name)


@shapes
def test_double_backward_agrees_with_finite_differences_of_the_backward(shape: tuple[int, ...]) -> None:
    x, dy, ddx = (random_array(*shape, seed=seed) for seed in range(3))
    weight, ddweight, ddbias = (random_array(shape[1], seed=seed) for seed in range(3, 6))
    found = batch_norm_double_backward(ddx, ddweight, ddbias, dy, batch_norm(x, weight, eps=0.1))

    def loss(x: np.ndarray = x, weight: np.ndarray = weight, dy: np.ndarray = dy) -> float:
        step = batch_norm_backward(dy, batch_norm(x, weight, eps=0.1))
        return float((step.dx * ddx).sum() + (step.dweight * ddweight).sum() + (step.dbias * ddbias).sum())

    np.testing.assert_allclose(found.ddy, central_difference(lambda v: loss(dy=v), dy), atol=FINITE_DIFFERENCE)
    np.testing.assert_allclose(found.dx, central_difference(lambda v: loss(x=v), x), atol=FINITE_DIFFERENCE)
    np.testing.assert_allclose(
        found.dweight, central_difference(lambda v: loss(weight=v), weight), atol=FINITE_DIFFERENCE
    )


def test_double_backward_takes_none_for_zero() -> None:
    x, dy, ddx = (random_array(6, 2, seed=seed) for seed in range(3))
    step = batch_norm(x)
    given_none, zeros = (batch_norm_double_backward(ddx, v, v, dy, step) for v in (None, np.zeros(2)))
    assert np.array_equal(given_none.ddy, zeros.ddy)
    assert np.array_equal(given_none.dx, zeros.dx)


@shapes
def test_inference_is_affine_and_its_backward_agrees_with_torch(shape: tuple[int, ...]) -> None:
    x, dy = random_array(*shape), random_array(*shape, seed=1)
    mean, weight, bias = (random_array(shape[1], seed=seed) for seed in (2, 3, 4))
    var = random_array(shape[1], seed=5) ** 2
    step = batch_norm_inference(x, mean, var, weight, bias)
    found = batch_norm_inference_backward(dy, step)
    leaves = [torch.tensor(value, requires_grad=True) for value in (x, weight, bias)]
    stored = torch.tensor(mean), torch.tensor(var)
    output = torch.nn.functional.batch_norm(leaves[0], *stored, *leaves[1:], training=False)
    close(step.output, output.detach(), "output")
    for name, one in zip(
        ("dx", "dweight", "dbias"), torch.autograd.grad(output, leaves, torch.tensor(dy)), strict=True
    ):
        close(getattr(found, name), one, name)


def test_a_constant_channel_gives_the_bias_exactly() -> None:
    step = batch_norm(np.full((7, 1), 0.1), [3.0], [0.25])
    assert step.output.ravel().tolist() == [0.25] * 7


def test_one_value_per_channel_gives_the_bias() -> None:
    assert batch_norm([[3.0, -4.0]], None, [1.0, 2.0]).output.tolist() == [[1.0, 2.0]]


def test_input_is_converted_and_left_alone() -> None:
    x = np.array([[1, 2], [3, 5]], dtype=np.int32)
    step = batch_norm(x)
    assert step.output.dtype == np.float64
    assert x.tolist() == [[1, 2], [3, 5]]
    assert np.array_equal(step.output, batch_norm(torch.tensor(x)).output)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: batch_norm(np.zeros(3)), ShapeError, r"1 dimensions, shape \(3,\)"),
        (lambda: batch_norm(np.zeros((1, 2, 3, 4, 5, 6))), ShapeError, "6 dimensions"),
        (lambda: batch_norm(np.zeros((0, 2))), ShapeError, "holds no value"),
        (lambda: batch_norm(np.zeros((2, 0))), ShapeError, "holds no value"),
        (lambda: batch_norm(np.zeros((4, 2)), [1.0]), ShapeError, r"weight has shape \(1,\), but x has 2 channels"),
        (lambda: batch_norm(np.zeros((4, 2)), None, [[1.0, 2.0]]), ShapeError, "bias has shape"),
        (lambda: batch_norm([[1.0], [2.0, 3.0]]), ShapeError, "no rectangular array"),
        (lambda: batch_norm(None), DtypeError, "x is None"),
        (lambda: batch_norm([["a"], ["b"]]), DtypeError, "real numbers"),
        (lambda: batch_norm(np.zeros((2, 2), dtype=complex)), DtypeError, "complex128"),
        (lambda: batch_norm(torch.zeros(2, 2, requires_grad=True)), DtypeError, r"x\.detach\(\)"),
        (lambda: batch_norm(torch.zeros(2, 2, dtype=torch.bfloat16)), DtypeError, r"\.double\(\)"),
        (lambda: batch_norm(np.zeros((2, 2)), eps=-1e-5), ArgumentError, "eps is -1e-05"),
        (lambda: batch_norm(np.zeros((2, 2)), eps=float("nan")), ArgumentError, "eps is nan"),
        (lambda: batch_norm([[1.0, 3.0], [2.0, 3.0]], eps=0.0), ArgumentError, "channel 1 has variance 0"),
        (lambda: batch_norm_inference([[1.0]], [0.0], [-1.0]), ArgumentError, "channel 0 has variance -1"),
        (lambda: batch_norm_inference([[1.0]], [0.0, 0.0], [1.0]), ShapeError, "mean has shape"),
        (lambda: batch_norm_backward(np.zeros((3, 2)), batch_norm(np.eye(2))), ShapeError, r"dy has shape \(3, 2\)"),
        (
            lambda: batch_norm_backward([[1.0]], batch_norm_inference([[1.0]], [0.0], [1.0])),
            ArgumentError,
            "call batch_norm_inference_backward",
        ),
        (
            lambda: batch_norm_inference_backward(np.eye(2), batch_norm(np.eye(2))),
            ArgumentError,
            "call batch_norm_backward",
        ),
        (
            lambda: batch_norm_double_backward(
                [[1.0]], None, None, [[1.0]], batch_norm_inference([[1.0]], [0.0], [1.0])
            ),
            ArgumentError,
            "linear in dy",
        ),
    ],
)
def test_bad_input_is_refused_in_words(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
