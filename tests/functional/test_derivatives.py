"""Every composition of forward and reverse mode, up to third order, against the same formula in plain operations.

Mixed partial derivatives do not depend on the order in which they are taken: one value, had from the formula in reverse
mode alone, is what every composition must give.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import normkit
from normkit import functional as NF
from normkit.functional import batch_steps
from normkit.layers.catalog import METHODS, METHODS_OF_WEIGHTS
from tolerances import RELATIVE

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]
Scalar = Callable[[Tensor], Tensor]

# torch compiles decompositions the first time, with what it itself calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

# Each order divides by the deviation once more, and the sums of a third derivative cancel: a digit for every order.
_LOST = {1: 10.0, 2: 100.0, 3: 1000.0}

EPS = 1e-3
MEAN, VAR = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([1.7, 0.6], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, True], [True, True, False]])
POINT = torch.tensor(
    [[[0.9, -0.4, 1.7], [0.2, -1.3, 0.6]], [[-0.8, 0.5, 0.1], [1.4, -0.7, -0.2]], [[-1.6, 1.1, -0.3], [0.8, 2.1, -0.9]]],
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
        return getattr(F, activation)(z + x.sin().flip(0) if with_residual else z)

    return formula


def ours_fused(activation: str, with_residual: bool, training: bool = True) -> Norm:
    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        running = (None, None) if training else (MEAN, VAR)
        residual = x.sin().flip(0) if with_residual else None
        return NF.batch_norm(x, *running, w, b, training, eps=EPS, activation=activation, residual=residual)

    return norm


def in_place(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return NF.batch_norm(x * 1.0, None, None, w, b, True, eps=EPS, inplace=True)


def steps_apart(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean, var = batch_steps.statistics(x)
    return batch_steps.apply(x, mean, (var + EPS).rsqrt(), w, b)


def whitening(iterations: int | None) -> Norm:
    return lambda x, w, b: NF.whitening_batch_norm(
        x, None, None, w, b, training=True, eps=EPS, iterations=iterations
    )


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
    "batch of rows": Row("batch_norm", lambda x, w, b: NF.batch_norm(x, None, None, w, b, True, eps=EPS), batch, (5, 2)),
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
        lambda x, w, b: NF.weight_standardization(x.transpose(0, 1).reshape(2, -1), EPS) * w.reshape(2, 1)
        + b.reshape(2, 1),
        standardization,
    ),
}


def cut(row: Row, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take x, weight and bias out of one vector, so that a direction moves them all."""
    size = math.prod(row.shape)
    return theta[:size].reshape(row.shape), theta[size : size + 2], theta[size + 2 :]


def functions(row: Row) -> tuple[Scalar, Scalar, Tensor, Tensor]:
    """Return ours and the formula as scalars of one vector, a point, and three directions."""
    generator = torch.Generator().manual_seed(7)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    size = math.prod(row.shape)
    x = POINT if row.shape == POINT.shape else draw(*row.shape)
    point = torch.cat([x.flatten(), draw(2).abs() + 0.5, draw(2)])
    along = draw(size)

    def scalar(norm: Norm) -> Scalar:
        return lambda theta: (torch.tanh(norm(*cut(row, theta))).flatten() * along).sum()

    return scalar(row.ours), scalar(row.formula), point, draw(3, point.numel()) * 0.3


def forward(f: Scalar, direction: Tensor) -> Scalar:
    return lambda theta: torch.func.jvp(f, (theta,), (direction,))[1]


def reverse(f: Scalar, direction: Tensor) -> Scalar:
    return lambda theta: torch.func.grad(f)(theta) @ direction


def pulled(f: Scalar, direction: Tensor) -> Scalar:
    def derivative(theta: Tensor) -> Tensor:
        value, pull = torch.func.vjp(f, theta)
        return pull(torch.ones_like(value))[0] @ direction

    return derivative


def mapped(f: Scalar, direction: Tensor) -> Scalar:
    # Two copies, of which the second is dropped: what is differentiated here is mapped.
    return lambda theta: torch.func.vmap(forward(f, direction))(torch.stack([theta, 2 * theta]))[0]


def mapped_reverse(f: Scalar, direction: Tensor) -> Scalar:
    return lambda theta: torch.func.vmap(reverse(f, direction))(torch.stack([theta, 2 * theta]))[0]


def recorded(f: Scalar, direction: Tensor) -> Scalar:
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


def expected_of(formula: Scalar, point: Tensor, directions: Tensor) -> dict[int, float]:
    found, f = {}, formula
    for order in (1, 2, 3):
        f = recorded(f, directions[order - 1])
        found[order] = f(point.clone().requires_grad_()).item()
    return found


def is_close(found: float, expected: float, order: int) -> bool:
    return abs(found - expected) <= RELATIVE[torch.float64] * _LOST[order] * max(1.0, abs(expected))


@pytest.mark.parametrize("name", ROWS)
def test_every_composition_is_that_of_the_formula(name: str) -> None:
    ours, formula, point, directions = functions(ROWS[name])
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
