"""E25: the scale of the weights before a batch norm changes nothing but the gradient's length."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...layers import BatchNorm1d
from ..charts import Bars, Chart, Panel, Table, norm_colour
from ..claim import Cell, Claim, Row
from ..data import Dataset
from ..rows import as_number, mean_and_spread, per_seed
from ..training import UNTRAINED
from ..verdicts import Rule, Verdict, conclude, single

__all__ = ["CLAIM", "deviations"]

SCALES = (0.01, 0.1, 10.0, 100.0)
# What the project's table of tolerances allows float64, relative to the largest number.
LINE = 1e-12
WORDS = {
    "output": "change of the output when the weights before the norm are scaled",
    "gradient": "distance of the weights' gradient from that before, over the scale",
    "along": "part of the weights' gradient that lies along the weights",
}
RULES = {
    name: Rule(effect=f"largest {words}, relative, in float64", unit="", direction="below", line=LINE)
    for name, words in WORDS.items()
}


def deviations(x: Tensor, weight: Tensor, direction: Tensor) -> dict[str, float]:
    """Return how far scaling a dense layer's weights before a batch norm is from changing the gradient's length alone.

    With ``y = BN(W x)``, ``y(aW) = y(W)`` and ``dL/dW (aW) = dL/dW (W) / a`` (van Laarhoven 2017, equations 3 and 4),
    and the gradient of every row is orthogonal to the row. Exact at eps = 0; here eps is 1e-30.
    """
    layer = BatchNorm1d(len(weight), eps=1e-30, track_running_stats=False).to(x)

    def passed(scale: float) -> tuple[Tensor, Tensor]:
        scaled = (scale * weight).requires_grad_()
        y = layer(functional.linear(x, scaled))
        (gradient,) = torch.autograd.grad(y, scaled, direction)
        return y.detach(), gradient

    y, gradient = passed(1.0)
    largest = dict.fromkeys(WORDS, 0.0)
    for scale in SCALES:
        there, steeper = passed(scale)
        largest["output"] = max(largest["output"], float((there - y).abs().max() / y.abs().max()))
        off = (steeper * scale - gradient).abs().max() / gradient.abs().max()
        largest["gradient"] = max(largest["gradient"], float(off))
    along = (gradient * weight).sum(1).abs() / (gradient.norm(dim=1) * weight.norm(dim=1))
    return {**largest, "along": float(along.max())}


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Draw weights and a gradient, and measure on a batch of images."""
    generator = torch.Generator().manual_seed(cell.seed)
    batch = torch.randperm(len(dataset.train_images), generator=generator)[: cell.settings.batch_size]
    images = dataset.train_images[batch].to(cell.device, torch.float64).flatten(1)
    weight, direction = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(cell.device)
        for shape in ((50, images.shape[1]), (len(images), 50))
    )
    yield deviations(images, weight, direction)


def _of(name: str, run: Sequence[Row]) -> float:
    return as_number(run[0][name])


def decide(rows: Sequence[Row]) -> Verdict:
    """Hold each deviation against what rounding leaves."""
    first, *others = (single(rule, per_seed(rows, partial(_of, name))) for name, rule in RULES.items())
    return conclude(first, details=others, compared="scaled against unscaled weights")


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the three deviations."""
    spreads = {name: mean_and_spread([as_number(row[name]) for row in rows]) for name in WORDS}
    bars = Bars(
        label="", categories=list(WORDS), heights=[mean for mean, _ in spreads.values()], colour=norm_colour("batch")
    )
    panel = Panel(title="Distance from the formula", x_label="of the", y_label="relative", marks=[bars], log_y=True)
    table = Table(
        title="Largest deviations in float64",
        header=["what", "relative", "allowed"],
        rows=[[WORDS[name], f"{mean:.1e} ± {spread:.1e}", f"{LINE:g}"] for name, (mean, spread) in spreads.items()],
        note=f"Mean ± standard deviation over seeds; weights scaled by {', '.join(f'{scale:g}' for scale in SCALES)}.",
    )
    text = f"Bars of the largest relative deviations: {'; '.join(f'{k} {m:.1e}' for k, (m, _) in spreads.items())}."
    return Chart(name="scale-invariance", title="Weights scaled before a norm", panels=(panel,), text=text), table


CLAIM = Claim(
    id="scale-invariance",
    number="E25",
    title="The scale of the weights before a batch norm does not change its output",
    statement="Behind a batch norm the scale of the weights drops out, and their gradient is as many times smaller as "
    "they are larger. So weight decay does not limit the function; it raises the effective learning rate.",
    source="van Laarhoven 2017, L2 regularization versus batch and weight normalization, arXiv:1706.05350, section 2; "
    "Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.3",
    prediction="With weights from 0.01 to 100 times as large the output is the same to within 1e-12 in float64, with "
    "eps near 0. Beside it: the gradient times the scale is the same, and it has no part along the weights.",
    question=RULES["output"],
    details=(RULES["gradient"], RULES["along"]),
    kind="formula",
    settings_rule="Nothing is trained. Each seed draws 256 images, weights of 50 units and a gradient at the output.",
    meaning={
        "supported": "The formulas hold to within rounding. With the usual eps they hold as far as the variances are "
        "larger than it.",
        "refuted": "A formula does not hold: either it or this implementation is wrong.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={"digits": UNTRAINED, "fashion-mnist": UNTRAINED},
    measure=measure,
    judge=decide,
    show=show,
)
