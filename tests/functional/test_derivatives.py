"""Every composition of forward and reverse mode, up to third order, against the same formula in plain operations.

Mixed partial derivatives do not depend on the order in which they are taken: one value, had from the formula in reverse
mode alone, is what every composition must give.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.nn import functional as F

import normkit
from normkit import functional as NF
from normkit.functional import batch_steps
from normkit.layers.catalog import METHODS, METHODS_OF_WEIGHTS, create
from tolerances import RELATIVE, assert_close
from torch_versions import uses_torchscript

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]
Function = Callable[[Tensor], Tensor]

# torch compiles decompositions the first time, with what it itself calls deprecated.
pytestmark = uses_torchscript

# Each order divides by the deviation once more, and the sums of a third derivative cancel: a digit for every order.
_LOST = {1: 10.0, 2: 100.0, 3: 1000.0}

EPS = 1e-3
MEAN, VAR = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([1.7, 0.6], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, True], [True, True, False]])
POINT = torch.tensor(
    [
        [[0.9, -0.4, 1.7], [0.2, -1.3, 0.6]],
        [[-0.8, 0.5, 0.1], [1.4, -0.7, -0.2]],
        [[-1.6, 1.1, -0.3], [0.8, 2.1, -0.9]],
    ],
    dtype=torch.float64,
)


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(1, -1, *(1 for _ in range(2, x.dim())))


def standardized(x: Tensor, axes: tuple[int, ...], centre: bool = True) -> Tensor:
    distance = x - x.mean(axes, keepdim=True) if centre else x
    return distance / (distance.square().mean(axes, keepdim=True) + EPS).sqrt()


def scaled(xhat: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return xhat * per_channel(w, xhat) + per_channel(b, xhat)


def batch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return scaled(standardized(x, (0, *range(2, x.dim()))), w, b)


def stored(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return scaled((x - per_channel(MEAN, x)) / (per_channel(VAR, x) + EPS).sqrt(), w, b)


def group(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    parts = x.reshape(x.shape[0], 1, -1)
    return scaled(standardized(parts, (2,)).reshape(x.shape), w, b)


def elementwise(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return standardized(x.movedim(1, -1), (-1,)) * w + b


def root_mean_square(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
    return standardized(x.movedim(1, -1), (-1,), centre=False) * w


def response(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    total = F.pad(x.square(), (0, 0, 1, 0))
    total = total[:, 1:] + total[:, :-1]
    return scaled(x * (1.0 + 0.5 / 2 * total) ** -0.75, w, b)


def adaptive(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    style = scaled(x.flip(0).sin(), w, b)
    var = (style - style.mean(2, keepdim=True)).square().mean(2, keepdim=True)
    return standardized(x, (2,)) * (var + EPS).sqrt() + style.mean(2, keepdim=True)


def renorm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    # r and d are constants to the derivative, as in the paper, section 3: found where the derivatives are taken.
    mean, var = POINT.mean((0, 2)), POINT.var((0, 2), unbiased=False)
    sigma = (VAR + EPS).sqrt()
    r = ((var + EPS).sqrt() / sigma).clamp(1 / 3, 3)
    d = ((mean - MEAN) / sigma).clamp(-5, 5)
    return scaled(standardized(x, (0, 2)) * per_channel(r, x) + per_channel(d, x), w, b)


def ghost(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.cat([batch(x[:2], w, b), batch(x[2:], w, b)])


def masked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    valid = MASK.unsqueeze(1).double()
    count = valid.sum()
    mean = (x * valid).sum((0, 2), keepdim=True) / count
    distance = (x - mean) * valid
    xhat = distance / (distance.square().sum((0, 2), keepdim=True) / count + EPS).sqrt()
    return scaled(xhat, w, b) * valid


def whitened(x: Tensor, w: Tensor, b: Tensor, steps: int = 60) -> Tensor:
    rows = x.transpose(0, 1).reshape(2, -1)
    distance = rows - rows.mean(1, keepdim=True)
    covariance = distance @ distance.mT / rows.shape[1] + EPS * torch.eye(2, dtype=x.dtype)
    # Two by two: the root of C is (C + sqrt(det C) I) / sqrt(trace C + 2 sqrt(det C)), by Cayley and Hamilton.
    if steps == 60:
        s = (covariance[0, 0] * covariance[1, 1] - covariance[0, 1] * covariance[1, 0]).sqrt()
        root = (covariance + s * torch.eye(2, dtype=x.dtype)) / (covariance.trace() + 2 * s).sqrt()
        inverse = torch.linalg.inv(root)
    else:
        total, inverse = covariance.trace(), torch.eye(2, dtype=x.dtype)
        for _ in range(steps):
            inverse = 1.5 * inverse - 0.5 * inverse @ inverse @ inverse @ covariance / total
        inverse = inverse / total.sqrt()
    return scaled((inverse @ distance).reshape(2, x.shape[0], *x.shape[2:]).transpose(0, 1), w, b)


def weight_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    v = x.transpose(0, 1).reshape(2, -1)
    return v / v.square().sum(1, keepdim=True).sqrt() * w.reshape(2, 1) + b.reshape(2, 1)


def standardization(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    v = x.transpose(0, 1).reshape(2, -1)
    return standardized(v, (1,)) * w.reshape(2, 1) + b.reshape(2, 1)


def fused(activation: str, with_residual: bool, training: bool = True) -> Norm:
    def formula(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = batch(x, w, b) if training else stored(x, w, b)
        z = z + x.sin().flip(0) if with_residual else z
        # torch's own silu has no second derivative where dual numbers pass through a backward.
        return z * torch.sigmoid(z) if activation == "silu" else getattr(F, activation)(z)

    return formula


def ours_fused(activation: str, with_residual: bool, training: bool = True) -> Norm:
    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        running = (None, None) if training else (MEAN, VAR)
        residual = x.sin().flip(0) if with_residual else None
        return NF.batch_norm(x, *running, w, b, training, eps=EPS, activation=activation, residual=residual)

    return norm


def whitening(iterations: int | None) -> Norm:
    return lambda x, w, b: NF.whitening_batch_norm(x, None, None, w, b, training=True, eps=EPS, iterations=iterations)


@dataclass(frozen=True)
class Row:
    """A norm of ours beside its formula.

    Attributes:
        stem: the function of the catalog that it is, or None.
        ours: of x, weight and bias.
        formula: the same in plain operations.
        shape: of x.
    """

    stem: str | None
    ours: Norm
    formula: Norm
    shape: tuple[int, ...] = (3, 2, 3)


ROWS = {
    "batch": Row("batch_norm", lambda x, w, b: NF.batch_norm(x, None, None, w, b, True, eps=EPS), batch),
    "batch of rows": Row(
        "batch_norm", lambda x, w, b: NF.batch_norm(x, None, None, w, b, True, eps=EPS), batch, (5, 2)
    ),
    "evaluation": Row("batch_norm", lambda x, w, b: NF.batch_norm(x, MEAN, VAR, w, b, eps=EPS), stored),
    "batch and relu": Row("batch_norm", ours_fused("relu", False), fused("relu", False)),
    "batch, sum and relu": Row("batch_norm", ours_fused("relu", True), fused("relu", True)),
    "batch, sum and silu": Row("batch_norm", ours_fused("silu", True), fused("silu", True)),
    "batch and leaky_relu": Row("batch_norm", ours_fused("leaky_relu", False), fused("leaky_relu", False)),
    "evaluation and silu": Row("batch_norm", ours_fused("silu", False, False), fused("silu", False, False)),
    "layer": Row("layer_norm", lambda x, w, b: NF.layer_norm(x.movedim(1, -1), (2,), w, b, EPS), elementwise),
    "rms": Row("rms_norm", lambda x, w, b: NF.rms_norm(x.movedim(1, -1), (2,), w, EPS), root_mean_square),
    "group": Row("group_norm", lambda x, w, b: NF.group_norm(x, 1, w, b, EPS), group),
    "instance": Row(
        "instance_norm",
        lambda x, w, b: NF.instance_norm(x, None, None, w, b, eps=EPS),
        lambda x, w, b: scaled(standardized(x, (2,)), w, b),
    ),
    "instance, evaluation": Row(
        "instance_norm", lambda x, w, b: NF.instance_norm(x, MEAN, VAR, w, b, False, eps=EPS), stored
    ),
    "response": Row(
        "local_response_norm",
        lambda x, w, b: scaled(NF.local_response_norm(x, 2, alpha=0.5), w, b),
        response,
    ),
    "adaptive": Row(
        "adaptive_instance_norm",
        lambda x, w, b: NF.adaptive_instance_norm(x, scaled(x.flip(0).sin(), w, b), EPS),
        adaptive,
    ),
    "renorm": Row(
        "batch_renorm",
        lambda x, w, b: NF.batch_renorm(x, MEAN, VAR, w, b, training=True, momentum=0.0, eps=EPS),
        renorm,
    ),
    "ghost": Row(
        "ghost_batch_norm",
        lambda x, w, b: NF.ghost_batch_norm(x, None, None, w, b, training=True, eps=EPS, ghost_size=2),
        ghost,
        (4, 2, 3),
    ),
    "masked": Row(
        "masked_batch_norm",
        lambda x, w, b: NF.masked_batch_norm(x, MASK, None, None, w, b, training=True, eps=EPS),
        masked,
    ),
    "whitening": Row("whitening_batch_norm", whitening(None), whitened),
    "whitening by iteration": Row("whitening_batch_norm", whitening(3), lambda x, w, b: whitened(x, w, b, 3)),
    "weight": Row(
        "weight_norm",
        lambda x, w, b: NF.weight_norm(x.transpose(0, 1).reshape(2, -1), w.reshape(2, 1)) + b.reshape(2, 1),
        weight_norm,
    ),
    "standardization": Row(
        "weight_standardization",
        lambda x, w, b: (
            NF.weight_standardization(x.transpose(0, 1).reshape(2, -1), EPS) * w.reshape(2, 1) + b.reshape(2, 1)
        ),
        standardization,
    ),
}


def cut(row: Row, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take x, weight and bias out of one vector, so that a direction moves them all."""
    size = math.prod(row.shape)
    return theta[:size].reshape(row.shape), theta[size : size + 2], theta[size + 2 :]


def draw(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


def vector(row: Row, norm: Norm) -> Function:
    """Return a norm as a function of one vector, which holds x, weight and bias, to another."""
    return lambda theta: torch.tanh(norm(*cut(row, theta))).flatten()


def scalar(row: Row, norm: Norm) -> Function:
    along = draw(math.prod(row.shape))
    return lambda theta: vector(row, norm)(theta) @ along


def point_of(row: Row) -> Tensor:
    x = POINT if row.shape == POINT.shape else draw(*row.shape)
    return torch.cat([x.flatten(), torch.tensor([1.3, 0.6, -0.4, 0.8], dtype=torch.float64)])


def forward(f: Function, direction: Tensor) -> Function:
    return lambda theta: torch.func.jvp(f, (theta,), (direction,))[1]


def reverse(f: Function, direction: Tensor) -> Function:
    return lambda theta: torch.func.grad(f)(theta) @ direction


def pulled(f: Function, direction: Tensor) -> Function:
    def derivative(theta: Tensor) -> Tensor:
        value, pull = torch.func.vjp(f, theta)
        return pull(torch.ones_like(value))[0] @ direction

    return derivative


def mapped(f: Function, direction: Tensor) -> Function:
    # Two copies, of which the second is dropped: what is differentiated here is mapped.
    return lambda theta: torch.func.vmap(forward(f, direction))(torch.stack([theta, 2 * theta]))[0]


def mapped_reverse(f: Function, direction: Tensor) -> Function:
    return lambda theta: torch.func.vmap(reverse(f, direction))(torch.stack([theta, 2 * theta]))[0]


def recorded(f: Function, direction: Tensor) -> Function:
    """The graph that autograd records, backward with create_graph."""

    def derivative(theta: Tensor) -> Tensor:
        leaf = theta if theta.requires_grad else theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        return gradient @ direction

    return derivative


STEPS = {"forward": forward, "reverse": reverse, "vjp": pulled, "vmap forward": mapped, "vmap reverse": mapped_reverse}
# The outermost comes last. Of third order every mix of both modes, and those that take another way in torch.
COMPOSITIONS: list[tuple[str, ...]] = [
    *((name,) for name in STEPS),
    *itertools.product(STEPS, repeat=2),
    *itertools.product(("forward", "reverse"), repeat=3),
    ("forward", "vmap forward", "reverse"),
    ("reverse", "vmap forward", "forward"),
    ("vjp", "forward", "vmap reverse"),
]


def expected_of(formula: Function, point: Tensor, directions: Tensor) -> dict[int, float]:
    found, f = {}, formula
    for order in (1, 2, 3):
        f = recorded(f, directions[order - 1])
        found[order] = f(point.clone().requires_grad_()).item()
    return found


def is_close(found: float, expected: float, order: int) -> bool:
    return abs(found - expected) <= RELATIVE[torch.float64] * _LOST[order] * max(1.0, abs(expected))


@pytest.mark.parametrize("name", ROWS)
def test_every_composition_is_that_of_the_formula(name: str) -> None:
    ours, formula, point = (
        scalar(ROWS[name], ROWS[name].ours),
        scalar(ROWS[name], ROWS[name].formula),
        point_of(ROWS[name]),
    )
    directions = draw(3, point.numel()) * 0.3
    expected = expected_of(formula, point, directions)
    wrong = []
    for composition in COMPOSITIONS:
        f = ours
        for step, direction in zip(composition, directions, strict=False):
            f = STEPS[step](f, direction)
        if name == "renorm" and any("vmap" in step for step in composition):
            # Every sample would need running statistics of its own.
            with pytest.raises(normkit.errors.StatisticsError, match="under vmap"):
                f(point)
            continue
        found = f(point).item()
        if not is_close(found, expected[len(composition)], len(composition)):
            wrong.append(f"{' of '.join(reversed(composition))}: {found!r} for {expected[len(composition)]!r}")
    assert not wrong, "\n".join(wrong)


def dual(f: Function, theta: Tensor, direction: Tensor) -> Tensor | None:
    """The derivative by dual numbers, None where a tangent was lost."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(theta, direction))).tangent


def gradient_of(f: Function, leaf: Tensor, given: Tensor | None = None, *, create_graph: bool = False) -> Tensor:
    (found,) = torch.autograd.grad(f(leaf), leaf, given, create_graph=create_graph, retain_graph=True)
    return found


def linearized(f: Function, theta: Tensor, direction: Tensor) -> Tensor:
    return torch.func.linearize(f, theta)[1](direction)


# Each takes the function to a vector, that to a scalar, a point, directions and a cotangent of the vector.
Way = Callable[[Function, Function, Tensor, Tensor, Tensor], Tensor | None]

JACOBIANS: dict[str, Way] = {
    "jacfwd": lambda h, f, x, v, c: torch.func.jacfwd(h)(x),
    "jacrev": lambda h, f, x, v, c: torch.func.jacrev(h)(x),
    "hessian": lambda h, f, x, v, c: torch.func.hessian(f)(x),
    "jacfwd of jacfwd": lambda h, f, x, v, c: torch.func.jacfwd(torch.func.jacfwd(h))(x),
    "jacrev of jacfwd": lambda h, f, x, v, c: torch.func.jacrev(torch.func.jacfwd(f))(x),
    "jacrev of jacrev": lambda h, f, x, v, c: torch.func.jacrev(torch.func.jacrev(h))(x),
    "jacfwd of hessian": lambda h, f, x, v, c: torch.func.jacfwd(torch.func.hessian(f))(x),
    "jacrev of hessian": lambda h, f, x, v, c: torch.func.jacrev(torch.func.hessian(f))(x),
    "jacfwd of jacfwd of jacfwd": lambda h, f, x, v, c: torch.func.jacfwd(torch.func.jacfwd(torch.func.jacfwd(f)))(x),
    "functional.jvp": lambda h, f, x, v, c: functional.jvp(h, x, v[0])[1],
    "functional.vjp": lambda h, f, x, v, c: functional.vjp(h, x, c)[1],
    "functional.hvp": lambda h, f, x, v, c: functional.hvp(f, x, v[0])[1],
    "functional.vhp": lambda h, f, x, v, c: functional.vhp(f, x, v[0])[1],
    "functional.hessian": lambda h, f, x, v, c: functional.hessian(f, x),
    "functional.hessian, vectorized": lambda h, f, x, v, c: functional.hessian(f, x, vectorize=True),
    "functional.hessian, forward mode": lambda h, f, x, v, c: functional.hessian(
        f, x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional.jacobian, forward mode": lambda h, f, x, v, c: functional.jacobian(
        h, x, vectorize=True, strategy="forward-mode"
    ),
    "dual numbers": lambda h, f, x, v, c: dual(h, x, v[0]),
    "dual numbers through a backward": lambda h, f, x, v, c: dual(
        lambda t: gradient_of(f, t), x.requires_grad_(), v[0]
    ),
    "dual numbers through two backwards": lambda h, f, x, v, c: dual(
        lambda t: gradient_of(lambda s: gradient_of(f, s, create_graph=True) @ v[1], t), x.requires_grad_(), v[0]
    ),
    "backward of dual numbers": lambda h, f, x, v, c: gradient_of(lambda t: dual(h, t, v[0]), x.requires_grad_(), c),
}


def with_cotangent(way: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor | None]) -> Way:
    """Forward now, and backward later with the cotangent as the variable: it stands outside of what is active then."""

    def derivative(h: Function, _: Function, x: Tensor, v: Tensor, c: Tensor) -> Tensor | None:
        leaf = x.requires_grad_()
        y = h(leaf)
        return way(lambda d: torch.autograd.grad(y, leaf, d, retain_graph=True)[0], c, draw(c.numel(), 1)[:, 0])

    return derivative


def forward_of_pullback(h: Function, x: Tensor, c: Tensor) -> Tensor:
    """The pullback is made outside of the forward mode that it is called in."""
    _, pull = torch.func.vjp(h, x)
    return torch.func.jvp(lambda d: pull(d.cos())[0], (c,), (c.flip(0),))[1]


def second_with_dual_cotangent(h: Function, _: Function, x: Tensor, v: Tensor, c: Tensor) -> Tensor | None:
    leaf = x.requires_grad_()
    first = gradient_of(h, leaf, c, create_graph=True)
    return dual(lambda d: torch.autograd.grad(first, leaf, d)[0], v[0], v[1])


def second_of_dual_cotangent(h: Function, _: Function, x: Tensor, v: Tensor, c: Tensor) -> Tensor | None:
    leaf = x.requires_grad_()
    y = h(leaf)

    def moved(d: Tensor) -> Tensor | None:
        return dual(lambda e: torch.autograd.grad(y, leaf, e, create_graph=True)[0], d, c.flip(0))

    found = moved(c)
    return None if found is None else torch.autograd.grad(found @ v[0], leaf)[0]


COTANGENTS: dict[str, Way] = {
    "dual cotangent": with_cotangent(dual),
    "jvp of a backward": with_cotangent(lambda pull, c, t: torch.func.jvp(pull, (c,), (t,))[1]),
    "jvp of jvp of a backward": with_cotangent(
        lambda pull, c, t: torch.func.jvp(lambda d: torch.func.jvp(lambda e: pull(e.sin()), (d,), (t,))[1], (c,), (t,))[
            1
        ]
    ),
    "vmap of a backward": with_cotangent(lambda pull, c, t: torch.func.vmap(pull)(torch.stack([c, t]))),
    "vmap of jvp of a backward": with_cotangent(
        lambda pull, c, t: torch.func.vmap(lambda d: torch.func.jvp(pull, (d,), (t,))[1])(torch.stack([c, t]))
    ),
    "jacfwd of a backward": with_cotangent(lambda pull, c, t: torch.func.jacfwd(pull)(c)),
    "jvp of a pullback": lambda h, f, x, v, c: forward_of_pullback(h, x, c),
    "jvp of jvp of a pullback": lambda h, f, x, v, c: torch.func.jvp(
        lambda d: forward_of_pullback(h, x, d.sin()), (c,), (c.flip(0),)
    )[1],
    "dual cotangent of a second backward": second_with_dual_cotangent,
    "second backward of a dual cotangent": second_of_dual_cotangent,
}
WAYS = JACOBIANS | COTANGENTS


def test_every_method_of_the_catalog_has_a_row() -> None:
    assert {row.stem for row in ROWS.values()} == {row.stem for row in (*METHODS, *METHODS_OF_WEIGHTS)}


# In plain operations silu is torch's own, which has no forward derivative of its backward, and says so.
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, None) for name in ROWS), *((name, "plain") for name in ROWS if "silu" not in name)]
)
def test_every_other_way_to_a_derivative_is_that_of_the_formula(name: str, backend: str | None) -> None:
    row, wrong = ROWS[name], []
    cotangent = draw(vector(row, row.formula)(point_of(row)).numel(), 1)[:, 0]
    # What is computed in plain operations by itself does not depend on the backend.
    ways = WAYS if backend is None else COTANGENTS
    for way, derivative in ways.items():
        directions = draw(3, point_of(row).numel())
        with normkit.use_backend(backend) if backend else contextlib.nullcontext():
            found, expected = (
                derivative(vector(row, norm), scalar(row, norm), point_of(row), directions, cotangent)
                for norm in (row.ours, row.formula)
            )
        assert expected is not None, way
        if found is None or found.shape != expected.shape:
            wrong.append(f"{way}: {'no tangent' if found is None else found.shape}")
        elif (found - expected).abs().max() > 1000 * RELATIVE[torch.float64] * expected.abs().max().clamp(min=1.0):
            wrong.append(f"{way}: off by {(found - expected).abs().max():.3g} of {expected.abs().max():.3g}")
    assert not wrong, "\n".join(wrong)


# torch warns of a constant that it folded itself.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("name", ["batch", "layer", "masked"])
def test_linearize(name: str) -> None:
    row = ROWS[name]
    point, direction = point_of(row), draw(point_of(row).numel(), 1)[:, 0]
    found, expected = (
        linearized(torch.func.grad(scalar(row, norm)), point, direction) for norm in (row.ours, row.formula)
    )
    assert_close(found, expected, dtype=torch.float64)


@pytest.mark.parametrize("name", ["batch", "evaluation", "layer", "rms", "group", "instance"])
def test_second_derivative_of_float32_is_computed_in_float64(name: str) -> None:
    row = ROWS[name]
    x, w, b = (value.float() for value in cut(row, point_of(row)))
    x = x + 100.0
    direction = draw(*row.shape).float()

    def second(norm: Norm, x: Tensor, w: Tensor, b: Tensor, direction: Tensor) -> Tensor:
        # The offset in x costs digits in every operation that is not in float64.
        def first(t: Tensor) -> Tensor:
            return torch.func.jvp(lambda s: norm(s, w, b), (t,), (direction,))[1]

        return torch.func.jvp(first, (x,), (direction,))[1]

    with torch.no_grad():
        running = (MEAN.float(), VAR.float())
    ours = row.ours
    if name == "evaluation":
        ours = lambda x, w, b: NF.batch_norm(x, *running, w, b, eps=EPS)  # noqa: E731
    found = second(ours, x, w, b, direction)
    expected = second(row.formula, x.double(), w.double(), b.double(), direction.double())
    assert found.dtype == torch.float32
    assert_close(found, expected, dtype=torch.float32)


STEPS_APART: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "forward": lambda f, x: torch.func.jvp(f, (x,), (x.flip(0),))[1],
    "dual numbers": lambda f, x: dual(f, x, x.flip(0)),
    "reverse": lambda f, x: torch.func.grad(lambda t: f(t).tanh().sum())(x),
    "hessian": lambda f, x: torch.func.hessian(lambda t: f(t).tanh().sum())(x),
    "jacfwd of jacfwd": lambda f, x: torch.func.jacfwd(torch.func.jacfwd(lambda t: f(t).tanh().sum()))(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
}


@pytest.mark.parametrize("way", STEPS_APART)
def test_transforms_see_into_the_steps_apart(way: str) -> None:
    def ours(x: Tensor) -> Tensor:
        mean, var = batch_steps.statistics(x)
        y = batch_steps.apply(x, mean, (var + EPS).rsqrt())
        sums = batch_steps.reduce(x.sin(), x, mean, (var + EPS).rsqrt())
        return y + batch_steps.apply_backward(x.sin(), x, mean, (var + EPS).rsqrt(), None, sums, 9)

    def formula(x: Tensor) -> Tensor:
        xhat, dy = standardized(x, (0, 2)), x.sin()
        rstd = (x.var((0, 2), unbiased=False, keepdim=True) + EPS).rsqrt()
        inner = dy - dy.mean((0, 2), keepdim=True) - xhat * (dy * xhat).mean((0, 2), keepdim=True)
        return xhat + rstd * inner

    found, expected = (STEPS_APART[way](function, POINT) for function in (ours, formula))
    assert found is not None
    assert_close(found, expected, dtype=torch.float64)


def test_in_place_in_forward_mode() -> None:
    def ours(x: Tensor) -> Tensor:
        return NF.batch_norm(x.sin(), None, None, training=True, eps=EPS, inplace=True)

    def formula(x: Tensor) -> Tensor:
        return standardized(x.sin(), (0, 2))

    for way in ("forward", "dual numbers", "jacfwd of jacfwd"):
        assert_close(STEPS_APART[way](ours, POINT), STEPS_APART[way](formula, POINT), dtype=torch.float64)
    with pytest.raises(normkit.errors.BackendError, match="where a gradient is recorded"):
        STEPS_APART["reverse"](ours, POINT)
    x = POINT.clone().requires_grad_()
    y = ours(x)
    with forward_ad.dual_level():
        (plain,) = torch.autograd.grad(y, x, POINT, retain_graph=True)
        with pytest.raises(normkit.errors.ArgumentError, match="in forward mode"):
            torch.autograd.grad(y, x, forward_ad.make_dual(POINT, POINT))
    assert_close(plain, torch.autograd.grad(formula(x), x, POINT)[0], dtype=torch.float64)


def tracking(kind: str) -> torch.nn.Module:
    made = normkit.InstanceNorm1d(2, track_running_stats=True) if kind == "instance" else create(kind, 2, 1)
    return made.double()


UPDATING = ("batch", "renorm", "ghost", "masked", "whitening", "instance")
ONCE = ("forward", "dual numbers", "reverse", "hessian", "jacfwd of jacfwd")


@pytest.mark.parametrize("kind", UPDATING)
def test_running_statistics_move_once_under_transforms_and_carry_nothing(kind: str) -> None:
    for way in ONCE:
        layer = tracking(kind)
        twin = copy.deepcopy(layer)
        STEPS_APART[way](layer, POINT)
        twin(POINT)
        for name, value in layer.named_buffers():
            assert not torch._C._functorch.is_functorch_wrapped_tensor(value)
            assert not value.requires_grad
            assert_close(value, twin.get_buffer(name), dtype=torch.float64, what=f"{name} by {way}")


@pytest.mark.parametrize("kind", UPDATING)
def test_one_set_of_running_statistics_is_refused_for_many_batches(kind: str) -> None:
    layer = tracking(kind)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    for call in (torch.func.vmap(layer), torch.func.grad(lambda many: torch.func.vmap(layer)(many).sum())):
        with pytest.raises(normkit.errors.StatisticsError, match="under vmap"):
            call(torch.stack([POINT, POINT]))
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name])


def test_operators_of_compiled_graphs_refuse_forward_mode() -> None:
    from normkit.kernels import operators

    def call(x: Tensor) -> Tensor:
        y, *_ = operators.batch_norm_forward(x, None, None, None, None, None, None, 0.0, EPS, True, None)
        return y + operators.batch_norm_inference(x, None, None, None, MEAN, VAR, EPS, None)[0]

    x = POINT.clone().requires_grad_()
    y = call(x)
    for way in ("forward", "dual numbers"):
        with pytest.raises(normkit.errors.BackendError, match="no derivative in forward mode"):
            STEPS_APART[way](call, POINT)
    with forward_ad.dual_level():
        assert_close(call(POINT), y.detach(), dtype=torch.float64, what="a call without tangents")
        with pytest.raises(normkit.errors.BackendError, match="no derivative in forward mode"):
            torch.autograd.grad(y, x, forward_ad.make_dual(POINT, POINT))


@pytest.mark.parametrize("name", ["batch", "layer"])
def test_derivatives_inside_a_compiled_function(name: str) -> None:
    row, direction = ROWS[name], POINT.flip(0)
    _, w, b = cut(row, point_of(row))

    def derivatives(norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
        def f(t: Tensor) -> Tensor:
            return norm(t, w, b).tanh().sum()

        along = torch.func.jvp(torch.func.grad(f), (x,), (direction,))[1]
        return along, torch.func.grad(lambda t: torch.func.jvp(f, (t,), (direction,))[1])(x)

    found = torch.compile(lambda x: derivatives(row.ours, x), fullgraph=True, backend="aot_eager")(POINT)
    for one, other in zip(found, derivatives(row.formula, POINT), strict=True):
        assert_close(one, other, dtype=torch.float64)
