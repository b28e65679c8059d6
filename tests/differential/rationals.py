"""Normalization in exact rational numbers: a judge of float64, and of channels of two or three values.

Only the square root is no rational. It is taken from an integer root of 2**-BITS relative precision, far below
anything that float64 can show; all else is exact.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

BITS = 220

Numbers = list[Fraction]


def exact(values: Sequence[float]) -> Numbers:
    """Every float is a rational."""
    return [Fraction(value) for value in values]


def mean_of(values: Numbers) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def reciprocal_root(value: Fraction) -> Fraction:
    """1 / sqrt(value) to BITS binary digits."""
    assert value > 0
    # The root of an integer of at least 2 * BITS digits has BITS of them.
    scale = 4 ** (BITS + max(0, value.numerator.bit_length() - value.denominator.bit_length()))
    return Fraction(math.isqrt(value.denominator * scale // value.numerator), math.isqrt(scale))


@dataclass(frozen=True)
class Normalized:
    """Values that share statistics, after the forward.

    Attributes:
        deviations: x - mean, or x where no mean is removed.
        mean: of the values, or 0.
        var: with divisor m; the mean square where no mean is removed.
        rstd: 1 / sqrt(var + eps).
        xhat: the normalized values.
        centred: whether the mean was removed.
    """

    deviations: Numbers
    mean: Fraction
    var: Fraction
    rstd: Fraction
    xhat: Numbers
    centred: bool

    def project(self, values: Numbers) -> Numbers:
        """P g = g - mean(g) - xhat mean(g xhat), SPEC A2; without the mean's part where no mean was removed."""
        along = mean_of([g * h for g, h in zip(values, self.xhat, strict=True)])
        shift = mean_of(values) if self.centred else Fraction(0)
        return [g - shift - h * along for g, h in zip(values, self.xhat, strict=True)]


def normalize(x: Numbers, eps: Fraction, *, centred: bool = True) -> Normalized:
    mean = mean_of(x) if centred else Fraction(0)
    deviations = [value - mean for value in x]
    var = mean_of([value**2 for value in deviations])
    rstd = reciprocal_root(var + eps)
    return Normalized(deviations, mean, var, rstd, [value * rstd for value in deviations], centred)


def input_gradient(step: Normalized, dxhat: Numbers) -> Numbers:
    """dx = rstd * P(dxhat)."""
    return [step.rstd * value for value in step.project(dxhat)]


def directional_derivative(step: Normalized, dxhat: Numbers, v: Numbers) -> Numbers:
    """d/dt of ``input_gradient`` along x + t v with dxhat held: also, the Hessian being symmetric, <dx, v>'s gradient.

    Every line is the derivative of one line of `normalize`, `Normalized.project` and `input_gradient`.
    """
    moved = [value - mean_of(v) for value in v] if step.centred else v
    dvar = 2 * mean_of([d * m for d, m in zip(step.deviations, moved, strict=True)])
    drstd = -(step.rstd**3) * dvar / 2
    dxhat_moved = [m * step.rstd + d * drstd for m, d in zip(moved, step.deviations, strict=True)]
    along = mean_of([g * h for g, h in zip(dxhat, step.xhat, strict=True)])
    dalong = mean_of([g * h for g, h in zip(dxhat, dxhat_moved, strict=True)])
    projected = step.project(dxhat)
    dprojected = [-(h * dalong) - hm * along for h, hm in zip(step.xhat, dxhat_moved, strict=True)]
    return [drstd * p + step.rstd * q for p, q in zip(projected, dprojected, strict=True)]
