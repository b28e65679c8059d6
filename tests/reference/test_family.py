"""Every method's reference through one table: finite differences for all gradients, 50 digits for both passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import torch

from normkit import reference
from normkit.errors import ArgumentError, DtypeError, ShapeError
from normkit.reference import Running
from tolerances import FINITE_DIFFERENCE

from .oracle import central_difference, close, exact_batch_norm, exact_gradient, random_array

EPS = 0.1
MASK = np.array([[True, True, False, True], [True, False, False, False], [True, True, True, True]])


@dataclass(frozen=True)
class Case:
    """One method on small arrays: how to call it, and which gradients its backward returns."""

    name: str
    arrays: dict[str, np.ndarray]
    forward: Callable
    backward: Callable
    gradients: dict[str, str]  # argument -> attribute of the backward's result


AFFINE = {"x": "dx", "weight": "dweight", "bias": "dbias"}


def affine(shape: tuple[int, ...], parameter_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    parameters = random_array(2, *parameter_shape, seed=9)
    return {"x": random_array(*shape), "weight": parameters[0], "bias": parameters[1]}


def cases() -> list[Case]:
    ref = reference
    running = Running(mean=random_array(3, seed=5), var=random_array(3, seed=6) ** 2 + 0.5)
    table = [
        Case(
            f"layer-{shape}-{normalized}",
            affine(shape, normalized),
            lambda x, weight, bias, n=normalized: ref.layer_norm(x, n, weight, bias, eps=EPS),
            ref.layer_norm_backward,
            AFFINE,
        )
        for shape, normalized in [
            ((5, 3), (3,)),
            ((2, 3, 4), (3, 4)),
            ((2, 1, 3, 2), (2,)),
            ((7,), (7,)),
            ((2, 1), (1,)),
        ]
    ]
    table += [
        Case(
            f"group-{shape}-{groups}",
            affine(shape, (shape[1],)),
            lambda x, weight, bias, g=groups: ref.group_norm(x, g, weight, bias, eps=EPS),
            ref.group_norm_backward,
            AFFINE,
        )
        for shape, groups in [((3, 6), 3), ((2, 4, 5), 2), ((2, 6, 1, 3), 6), ((1, 3, 2, 1, 2), 1)]
    ]
    table += [
        Case(
            f"instance-{shape}",
            affine(shape, (shape[1],)),
            lambda x, weight, bias: ref.instance_norm(x, weight, bias, eps=EPS),
            ref.instance_norm_backward,
            AFFINE,
        )
        for shape in [(2, 3, 5), (3, 1, 2, 3), (1, 2, 2, 1, 3)]
    ]
    table += [
        Case(
            f"rms-{shape}-{normalized}",
            {"x": random_array(*shape), "weight": random_array(*normalized, seed=9)},
            lambda x, weight, n=normalized: ref.rms_norm(x, n, weight, eps=EPS),
            ref.rms_norm_backward,
            {"x": "dx", "weight": "dweight"},
        )
        for shape, normalized in [((5, 3), (3,)), ((2, 3, 4), (3, 4)), ((2, 3, 1), (1,))]
    ]
    table += [
        Case(
            f"response-{shape}-{size}",
            {"x": random_array(*shape)},
            lambda x, n=size: ref.local_response_norm(x, n, alpha=2.0, beta=0.75, k=1.5),
            ref.local_response_norm_backward,
            {"x": "dx"},
        )
        for shape, size in [((2, 5), 3), ((2, 5, 3), 2), ((1, 3, 2, 2), 7), ((2, 4), 1)]
    ]
    table += [
        Case(
            f"adaptive-{content}-{style}",
            {"content": random_array(*content), "style": random_array(*style, seed=1)},
            lambda content, style: ref.adaptive_instance_norm(content, style, eps=EPS),
            ref.adaptive_instance_norm_backward,
            {"content": "dcontent", "style": "dstyle"},
        )
        for content, style in [((2, 3, 4), (2, 3, 4)), ((2, 2, 3, 2), (2, 2, 5))]
    ]
    table += [
        Case(
            f"weight-{shape}-{dim}",
            {"v": random_array(*shape), "magnitude": random_array(*size, seed=1)},
            lambda v, magnitude, d=dim: ref.weight_norm(v, magnitude, dim=d),
            ref.weight_norm_backward,
            {"v": "dv", "magnitude": "dmagnitude"},
        )
        for shape, dim, size in [
            ((3, 4), 0, (3, 1)),
            ((2, 3, 2), 1, (1, 3, 1)),
            ((2, 3), None, (1, 1)),
            ((2, 3), -1, (1, 3)),
        ]
    ]
    table += [
        Case(
            f"standardization-{shape}",
            {"weight": random_array(*shape)},
            lambda weight: ref.weight_standardization(weight, eps=EPS),
            ref.weight_standardization_backward,
            {"weight": "dx"},
        )
        for shape in [(3, 4), (2, 3, 2, 2)]
    ]
    table += [
        Case(
            f"ghost-{shape}-{size}",
            affine(shape, (shape[1],)),
            lambda x, weight, bias, g=size: ref.ghost_batch_norm(x, g, weight, bias, eps=EPS),
            ref.ghost_batch_norm_backward,
            AFFINE,
        )
        for shape, size in [((7, 2), 3), ((4, 3, 2), 8), ((5, 1, 2, 2), 2)]
    ]
    table.append(
        Case(
            "masked",
            affine((3, 2, 4), (2,)),
            lambda x, weight, bias: ref.masked_batch_norm(x, MASK, weight, bias, eps=EPS),
            ref.masked_batch_norm_backward,
            AFFINE,
        )
    )
    table += [
        Case(
            f"whitening-{shape}-{groups}-{iterations}-{shrinkage}",
            affine(shape, (shape[1],)),
            lambda x, weight, bias, g=groups, i=iterations, s=shrinkage: ref.whitening_batch_norm(
                x, weight, bias, num_groups=g, eps=EPS, iterations=i, shrinkage=s
            ),
            ref.whitening_batch_norm_backward,
            AFFINE,
        )
        for shape in [(9, 4), (3, 4, 5)]
        for groups, iterations, shrinkage in [(1, None, 0.0), (2, None, 0.3), (1, 3, 0.3), (2, 5, 0.0), (4, None, 0.0)]
    ]
    table.append(renorm_case(running))
    return table


def renorm_case(running: Running) -> Case:
    """Hold r and d at their values at x, since they are constants to the gradient."""
    arrays = affine((8, 3), (3,))
    limits = {"r_max": 1.2, "d_max": 0.4, "eps": EPS}
    held = reference.batch_renorm(arrays["x"], running, **limits)

    def forward(x, weight, bias):
        if x is arrays["x"]:
            return reference.batch_renorm(x, running, weight, bias, **limits)
        return reference.batch_norm(x, weight * held.r, weight * held.d + bias, eps=EPS)

    return Case("renorm", arrays, forward, reference.batch_renorm_backward, AFFINE)


CASES = cases()
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_every_gradient_agrees_with_finite_differences(case: Case) -> None:
    forward = case.forward(**case.arrays)
    dy = random_array(*forward.output.shape, seed=20)
    found = case.backward(dy, forward)
    for argument, attribute in case.gradients.items():

        def loss(moved: np.ndarray, argument: str = argument) -> float:
            arrays = {name: value.copy() for name, value in case.arrays.items()} | {argument: moved}
            return float((case.forward(**arrays).output * dy).sum())

        slope = central_difference(loss, case.arrays[argument])
        gradient = getattr(found, attribute)
        assert gradient.shape == slope.shape
        np.testing.assert_allclose(gradient, slope, atol=FINITE_DIFFERENCE, err_msg=argument)


@every_case
def test_input_is_left_alone_and_output_is_float64(case: Case) -> None:
    before = {name: value.copy() for name, value in case.arrays.items()}
    forward = case.forward(**case.arrays)
    case.backward(forward.output, forward)
    assert forward.output.dtype == np.float64
    assert all(np.array_equal(before[name], case.arrays[name]) for name in before)


@every_case
def test_a_cotangent_of_another_shape_is_refused(case: Case) -> None:
    forward = case.forward(**case.arrays)
    with pytest.raises(ShapeError, match=r"has shape \(1, 1, 1, 1, 1, 1\)"):
        case.backward(np.zeros((1,) * 6), forward)


# The same functions from their definition, on lists of 50-digit numbers.


def exact_rms(values: Sequence) -> list:
    root = mpmath.sqrt(mpmath.fsum(v**2 for v in values) / len(values) + mpmath.mpf(EPS))
    return [v / root for v in values]


def exact_response(values: Sequence) -> list:
    # three channels at each side of the window's centre: size 3
    padded = [mpmath.mpf(0), *values, mpmath.mpf(0)]
    scales = [1.5 + mpmath.mpf(2) / 3 * sum(p**2 for p in padded[c : c + 3]) for c in range(len(values))]
    return [v / scale ** mpmath.mpf("0.75") for v, scale in zip(values, scales, strict=True)]


def exact_weight(values: Sequence) -> list:
    norm = mpmath.sqrt(mpmath.fsum(v**2 for v in values))
    return [mpmath.mpf(3) * v / norm for v in values]


def exact_adaptive(values: Sequence) -> list:
    half = len(values) // 2
    style = values[half:]
    mean = mpmath.fsum(style) / half
    std = mpmath.sqrt(mpmath.fsum((s - mean) ** 2 for s in style) / half + mpmath.mpf(EPS))
    return exact_batch_norm(values[:half], std, mean, EPS)


def exact_whitening(values: Sequence) -> list:
    """Three channels; the inverse root from mpmath's own eigenvectors."""
    m = len(values) // 3
    x = mpmath.matrix(3, m)
    for channel in range(3):
        part = values[channel * m : (channel + 1) * m]
        for column in range(m):
            x[channel, column] = part[column] - mpmath.fsum(part) / m
    eigenvalues, vectors = mpmath.eigsy(x * x.T / m + mpmath.mpf(EPS) * mpmath.eye(3))
    root = vectors * mpmath.diag([1 / mpmath.sqrt(value) for value in eigenvalues]) * vectors.T
    return list(root * x)


def rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(1, -1)


EXACT = {
    "layer": (6, lambda v: exact_batch_norm(v, 1, 0, EPS), lambda x: reference.layer_norm(x, len(x), eps=EPS), "dx"),
    "group": (6, lambda v: exact_batch_norm(v, 1, 0, EPS), lambda x: reference.group_norm(rows(x), 1, eps=EPS), "dx"),
    "instance": (
        6,
        lambda v: exact_batch_norm(v, 1, 0, EPS),
        lambda x: reference.instance_norm(x[None, None], eps=EPS),
        "dx",
    ),
    "rms": (6, exact_rms, lambda x: reference.rms_norm(x, len(x), eps=EPS), "dx"),
    "response": (
        5,
        exact_response,
        lambda x: reference.local_response_norm(rows(x), 3, alpha=2.0, beta=0.75, k=1.5),
        "dx",
    ),
    "weight": (5, exact_weight, lambda x: reference.weight_norm(rows(x), [[3.0]]), "dv"),
    "standardization": (
        6,
        lambda v: exact_batch_norm(v, 1, 0, EPS),
        lambda x: reference.weight_standardization(rows(x), eps=EPS),
        "dx",
    ),
    "ghost": (
        6,
        lambda v: exact_batch_norm(v[:3], 1, 0, EPS) + exact_batch_norm(v[3:], 1, 0, EPS),
        lambda x: reference.ghost_batch_norm(x[:, None], 3, eps=EPS),
        "dx",
    ),
    "masked": (
        6,
        lambda v: [*exact_batch_norm(v[:4], 1, 0, EPS), mpmath.mpf(0), mpmath.mpf(0)],
        lambda x: reference.masked_batch_norm(x[None, None], np.arange(6)[None] < 4, eps=EPS),
        "dx",
    ),
    "whitening": (
        12,
        exact_whitening,
        lambda x: reference.whitening_batch_norm(x.reshape(1, 3, 4), eps=EPS),
        "dx",
    ),
}
BACKWARD = {
    "layer": reference.layer_norm_backward,
    "group": reference.group_norm_backward,
    "instance": reference.instance_norm_backward,
    "rms": reference.rms_norm_backward,
    "response": reference.local_response_norm_backward,
    "weight": reference.weight_norm_backward,
    "standardization": reference.weight_standardization_backward,
    "ghost": reference.ghost_batch_norm_backward,
    "masked": reference.masked_batch_norm_backward,
    "whitening": reference.whitening_batch_norm_backward,
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "mean-1e4"])
def test_forward_and_backward_agree_with_fifty_digits(name: str, offset: float) -> None:
    size, exact, call, attribute = EXACT[name]
    x, dy = random_array(size) + offset, random_array(size, seed=1)
    forward = call(x)
    with mpmath.workdps(50):
        expected = [float(value) for value in exact([mpmath.mpf(value) for value in x])]
    close(forward.output.ravel(), expected, "output")
    found = BACKWARD[name](dy.reshape(forward.output.shape), forward)
    close(getattr(found, attribute).ravel(), exact_gradient(exact, x, dy), attribute)


def test_adaptive_agrees_with_fifty_digits_in_content_and_style() -> None:
    both, dy = random_array(10), random_array(5, seed=1)
    forward = reference.adaptive_instance_norm(both[None, None, :5], both[None, None, 5:], eps=EPS)
    with mpmath.workdps(50):
        expected = [float(value) for value in exact_adaptive([mpmath.mpf(value) for value in both])]
    close(forward.output.ravel(), expected)
    found = reference.adaptive_instance_norm_backward(dy[None, None], forward)
    gradients = exact_gradient(exact_adaptive, both, dy)
    close(np.concatenate([found.dcontent.ravel(), found.dstyle.ravel()]), gradients)


# What is true of the family by its definition.


def test_group_norm_is_layer_norm_with_one_group_and_instance_norm_with_one_channel_each() -> None:
    x = random_array(2, 6, 3, 5)
    close(reference.group_norm(x, 1).output, reference.layer_norm(x, (6, 3, 5)).output)
    close(reference.group_norm(x, 6).output, reference.instance_norm(x).output)


def test_instance_norm_of_one_sample_is_batch_norm() -> None:
    x = random_array(1, 4, 3, 5)
    close(reference.instance_norm(x).output, reference.batch_norm(x).output)


def test_rms_norm_is_layer_norm_where_the_mean_is_zero() -> None:
    x = random_array(4, 7)
    x = x - x.mean(axis=1, keepdims=True)
    close(reference.rms_norm(x, 7, eps=1e-5).output, reference.layer_norm(x, 7).output)


def test_adaptive_output_has_the_style_statistics() -> None:
    content, style = random_array(2, 3, 4, 5) * 7 - 2, random_array(2, 3, 11, seed=1) * 3 + 5
    output = reference.adaptive_instance_norm(content, style, eps=0.0).output
    close(output.mean(axis=(2, 3)), style.mean(axis=2))
    close(output.std(axis=(2, 3)), style.std(axis=2))


def test_renorm_without_limits_is_prediction_and_with_none_is_batch_norm() -> None:
    x, running = random_array(8, 3), Running(mean=random_array(3, seed=1), var=random_array(3, seed=2) ** 2)
    free = reference.batch_renorm(x, running, r_max=1e9, d_max=1e9)
    close(free.output, reference.batch_norm_inference(x, running.mean, running.var).output)
    tied = reference.batch_renorm(x, running, r_max=1.0, d_max=0.0)
    close(tied.output, reference.batch_norm(x).output)


def test_renorm_clips_at_both_ends() -> None:
    x = np.array([[-1.0, -10.0, 0.0], [1.0, 10.0, 2.0]])
    held = reference.batch_renorm(
        x, Running(mean=np.array([0.0, 9.0, -9.0]), var=np.array([16.0, 1.0, 1.0])), r_max=3.0, d_max=5.0, eps=0.0
    )
    close(held.r, [1 / 3, 3.0, 1.0])
    close(held.d, [0.0, -5.0, 5.0])


def test_ghost_norm_of_a_small_batch_is_batch_norm() -> None:
    x = random_array(3, 4, 2)
    close(reference.ghost_batch_norm(x, 8).output, reference.batch_norm(x).output)


@pytest.mark.parametrize("samples", range(1, 40))
@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_ghost_sizes_are_even_and_within_the_limit(samples: int, size: int) -> None:
    sizes = reference.ghost_sizes(samples, size)
    assert sum(sizes) == samples
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-samples // size)


def test_masked_norm_does_not_change_with_more_padding_or_with_what_stands_in_it() -> None:
    x, mask = random_array(3, 2, 4), MASK
    short = reference.masked_batch_norm(x, mask)
    padded = np.concatenate([np.where(mask[:, None], x, np.nan), np.full((3, 2, 5), np.nan)], axis=2)
    long = reference.masked_batch_norm(padded, np.pad(mask, ((0, 0), (0, 5))))
    assert np.array_equal(long.output[:, :, :4], short.output)
    assert not long.output[:, :, 4:].any()


@pytest.mark.parametrize("groups", [1, 2])
def test_whitened_channels_are_uncorrelated_with_unit_variance(groups: int) -> None:
    x = random_array(50, 4) @ random_array(4, 4, seed=1) + 10
    xhat = reference.whitening_batch_norm(x, num_groups=groups, eps=0.0).xhat
    d = 4 // groups
    for start in range(0, 4, d):
        close(np.cov(xhat[:, start : start + d].T, bias=True), np.eye(d))


def test_newton_approaches_the_eigenvectors() -> None:
    x = random_array(50, 3)
    exact = reference.whitening_batch_norm(x).output
    errors = [abs(reference.whitening_batch_norm(x, iterations=i).output - exact).max() for i in (1, 3, 5, 12)]
    assert errors == sorted(errors, reverse=True)
    close(reference.whitening_batch_norm(x, iterations=12).output, exact)


def test_whitening_with_full_shrinkage_divides_by_one_deviation() -> None:
    x = random_array(20, 3)
    x = x - x.mean(axis=0)
    output = reference.whitening_batch_norm(x, shrinkage=1.0, eps=0.0).output
    close(output, x / np.sqrt((x**2).mean()))


def test_whitening_gradient_is_finite_where_eigenvalues_are_equal() -> None:
    corners = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    forward = reference.whitening_batch_norm(corners, eps=0.0)  # the covariance is the identity
    dy = random_array(4, 2)
    found = reference.whitening_batch_norm_backward(dy, forward).dx
    slope = central_difference(lambda x: float((reference.whitening_batch_norm(x, eps=0.0).output * dy).sum()), corners)
    np.testing.assert_allclose(found, slope, atol=FINITE_DIFFERENCE)


def test_whitening_with_stored_statistics_of_the_batch_is_the_training_output() -> None:
    x = random_array(9, 4, 3)
    step = reference.whitening_batch_norm(x, num_groups=2, shrinkage=0.1)
    stored = reference.whitening_batch_norm_inference(x, step.mean, step.covariance, shrinkage=0.1)
    close(stored, step.output)


def test_instance_statistics_are_what_torch_stores() -> None:
    layer = torch.nn.InstanceNorm1d(3, track_running_stats=True, momentum=1.0).double()
    x = random_array(4, 3, 7)
    layer(torch.tensor(x))
    found = reference.instance_statistics(reference.instance_norm(x))
    close(found.mean, layer.running_mean)
    close(found.unbiased_var, layer.running_var)


ZERO = Running(mean=np.zeros(2), var=np.ones(2))
REFUSED = [
    (lambda r: r.layer_norm(np.zeros((2, 3)), 4), ShapeError, r"does not end in normalized_shape \(4,\)"),
    (lambda r: r.layer_norm(np.zeros((2, 3)), ()), ShapeError, "does not end in"),
    (lambda r: r.layer_norm(np.zeros((2, 3)), 3, [1.0]), ShapeError, r"weight has shape \(1,\)"),
    (lambda r: r.layer_norm(np.zeros((0, 3)), 3), ShapeError, "holds no value"),
    (lambda r: r.layer_norm(np.zeros((2, 3)), 3, eps=0.0), ArgumentError, "have no scale"),
    (lambda r: r.rms_norm(np.zeros((2, 3)), 3, eps=0.0), ArgumentError, "a row of x is zero"),
    (lambda r: r.rms_norm(np.zeros((0, 3)), 3), ShapeError, "holds no value"),
    (lambda r: r.group_norm(np.zeros((2, 6)), 4), ArgumentError, "does not divide the 6 channels"),
    (lambda r: r.group_norm(np.zeros(6), 2), ShapeError, "needs"),
    (lambda r: r.instance_norm(np.zeros((2, 6))), ShapeError, "needs positions"),
    (lambda r: r.local_response_norm(np.zeros((2, 6)), 0), ArgumentError, "size is 0"),
    (lambda r: r.local_response_norm(np.zeros((2, 6)), 3, k=0.0), ArgumentError, "must be positive"),
    (lambda r: r.local_response_norm(np.zeros(6), 3), ShapeError, "needs"),
    (lambda r: r.adaptive_instance_norm(np.zeros((2, 3, 4)), np.zeros((2, 2, 4))), ShapeError, "same samples"),
    (lambda r: r.weight_norm(np.zeros((2, 3)), np.ones((2, 1))), ArgumentError, "no direction"),
    (lambda r: r.weight_norm(np.ones((2, 3)), np.ones(2)), ShapeError, "magnitude has shape"),
    (lambda r: r.weight_norm(np.ones((2, 3)), np.ones((2, 1)), dim=2), ShapeError, "no dimension 2"),
    (lambda r: r.weight_standardization(np.ones(3)), ShapeError, "needs"),
    (lambda r: r.batch_renorm(np.eye(2), ZERO, r_max=0.5, d_max=0.0), ArgumentError, "r_max is 0.5"),
    (lambda r: r.batch_renorm(np.eye(2), ZERO, r_max=1.0, d_max=-1.0), ArgumentError, "d_max -1"),
    (lambda r: r.ghost_batch_norm(np.eye(2), 0), ArgumentError, "ghost_size is 0"),
    (lambda r: r.masked_batch_norm(np.zeros((2, 3, 4)), np.ones((2, 4))), DtypeError, "pass booleans"),
    (lambda r: r.masked_batch_norm(np.zeros((2, 3, 4)), np.ones((2, 3), bool)), ShapeError, r"pass \(2, 4\)"),
    (lambda r: r.masked_batch_norm(np.zeros((2, 3)), np.zeros(2, bool)), ShapeError, "no valid position"),
    (lambda r: r.whitening_batch_norm(np.eye(3), num_groups=2), ArgumentError, "does not divide"),
    (lambda r: r.whitening_batch_norm(np.eye(3), eps=0.0), ArgumentError, "larger eps"),
    (lambda r: r.whitening_batch_norm(np.eye(3), shrinkage=1.5), ArgumentError, "shrinkage is 1.5"),
    (lambda r: r.whitening_batch_norm(np.eye(3), iterations=0), ArgumentError, "iterations is 0"),
    (lambda r: r.whitening_batch_norm_inference(np.eye(4), np.zeros(4), np.zeros((2, 4, 4))), ShapeError, "covariance"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_bad_input_is_refused_in_words(call: Callable, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(reference)
