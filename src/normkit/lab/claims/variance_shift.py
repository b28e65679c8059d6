"""E13: dropout before a batch norm shifts the variance between training and prediction."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...layers import BatchNorm1d
from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import over_epochs
from ..data import Dataset
from ..networks import DenseNetwork
from ..probes import probe, recorded
from ..rows import as_number, mean_and_spread, per_seed, where
from ..training import TrainingSettings, seeded, train, with_seed
from ..verdicts import Rule, Verdict, combine, judge, judge_values

__all__ = ["CLAIM", "variance_ratio"]

FORMULA = Rule(
    effect="distance of the measured variance ratio from v/((c^2+v)/p-c^2), relative, mean over p and c",
    unit="",
    direction="below",
    threshold=0.01,
    predicted=0.0,
)
SHIFT = Rule(
    effect="distance of the variance ratio from 1, mean over batch norms, dropout before them minus dropout after them",
    unit="",
    direction="above",
    threshold=0.05,
)
ACCURACY = Rule(
    effect="test accuracy of the last epoch, dropout after every batch norm minus dropout before two of them",
    unit="",
    direction="above",
    threshold=0.0,
)
KEEP = (0.5, 0.7, 0.9)
MEANS = (0.0, 1.0)
SAMPLES, BATCHES = 50_000, 20
# Which hidden layer the one dropout follows: of three layers, two batch norms come after the first.
ORDERS = {"before": 0, "after": 2}
SETTINGS = TrainingSettings(epochs=10, batch_size=64, optimizer="adam", learning_rate=0.002)


def variance_ratio(keep: float, mean: float, variance: float) -> float:
    """Return the variance at prediction over that in training, behind a dropout (Li et al. 2019).

    >>> variance_ratio(keep=0.5, mean=0.0, variance=1.0)
    0.5
    """
    return variance / ((mean**2 + variance) / keep - mean**2)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train a net with one dropout and yield, per epoch, the variance ratio at each batch norm."""
    order = str(dict(cell.variant)["order"])
    formula = _measured_over_formula(cell.seed) if order == "before" else []
    model = with_seed(
        lambda: DenseNetwork([128] * 3, cell.norm, dropout=0.5, dropout_after=ORDERS[order]), cell.seed
    )  # fmt: skip
    # The masks are drawn from torch's own random numbers.
    with seeded(cell.seed, cell.device):
        for epoch in train(model, dataset, cell.settings, cell.seed, cell.device):
            ratios = _ratios(model, dataset.train_images[:2000].to(cell.device))
            yield {**asdict(epoch), "ratios": ratios, "formula": formula}


def _measured_over_formula(seed: int) -> list[float]:
    """Feed a batch norm dropped-out normal numbers, and return its variance ratio over the formula's, per p and c."""
    generator = torch.Generator().manual_seed(seed)
    quotients = []
    for keep in KEEP:
        layer = BatchNorm1d(len(MEANS), momentum=None)
        plain = torch.zeros(len(MEANS), dtype=torch.float64)
        for _ in range(BATCHES):
            x = torch.randn(SAMPLES, len(MEANS), generator=generator) + torch.tensor(MEANS)
            mask = torch.rand(x.shape, generator=generator) < keep
            layer(x * mask / keep)
            plain += x.var(0).double() / BATCHES
        measured = plain / layer.get_buffer("running_var").double()
        quotients += [ratio / variance_ratio(keep, c, 1.0) for ratio, c in zip(measured.tolist(), MEANS, strict=True)]
    return quotients


def _ratios(model: DenseNetwork, images: Tensor) -> list[float]:
    """Return, per batch norm, the variance of its input at prediction over that in training, mean over channels."""
    names = [f"norms.{place}" for place in range(len(model.norms))]
    inputs = []
    with probe(model) as copied, recorded(copied, names) as seen, torch.no_grad():
        for training in (False, True):
            copied.train(training)
            copied(images)
            inputs.append([seen[name][0].double().var(0) for name in names])
    return [float((predicted / trained.clamp_min(1e-12)).mean()) for predicted, trained in zip(*inputs, strict=True)]


def decide(rows: Sequence[Row]) -> Verdict:
    """Hold the formula, the shift in a net, and the accuracy against their lines."""
    sides = {order: where(rows, order=order) for order in ORDERS}
    formula = per_seed(sides["before"], lambda run: fmean(abs(as_number(q) - 1) for q in run[0]["formula"]))
    shift = {
        order: per_seed(side, lambda run: fmean(abs(as_number(ratio) - 1) for ratio in run[-1]["ratios"]))
        for order, side in sides.items()
    }
    accuracy = {order: per_seed(side, lambda run: as_number(run[-1]["test_accuracy"])) for order, side in sides.items()}
    parts = [
        judge_values(FORMULA, formula),
        judge(SHIFT, shift["before"], shift["after"]),
        judge(ACCURACY, accuracy["after"], accuracy["before"]),
    ]
    return combine(parts, compared="dropout before two batch norms against dropout after all")


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show accuracy and test loss by epoch for both orders, and the ratios as a table."""
    sides = {order: where(rows, order=order) for order in ORDERS if where(rows, order=order)}
    panels = [
        Panel(
            title=title,
            x_label="epoch",
            y_label=unit,
            marks=[
                over_epochs(side, column, label=f"dropout {order}", colour=i)
                for i, (order, side) in enumerate(sides.items())
            ],
        )
        for title, unit, column in (
            ("Test accuracy", "share right", "test_accuracy"),
            ("Test loss", "cross-entropy", "test_loss"),
        )
    ]
    lines, words = [], []
    for order, side in sides.items():
        last = [run for run in side if run["epoch"] == side[-1]["epoch"]]
        ratios = [mean_and_spread([as_number(row["ratios"][place]) for row in last]) for place in range(3)]
        accuracy = mean_and_spread([as_number(row["test_accuracy"]) for row in last])
        lines.append([order, *(f"{mean:.3f} ± {spread:.3f}" for mean, spread in [*ratios, accuracy])])
        words.append(
            f"with dropout {order}, ratios {', '.join(f'{mean:.3f}' for mean, _ in ratios)} and accuracy "
            f"{accuracy[0]:.4f}"
        )
    table = Table(
        title="Variance at prediction over variance in training",
        header=["dropout", "batch norm 1", "batch norm 2", "batch norm 3", "test accuracy"],
        rows=lines,
        note="After the last epoch, mean ± standard deviation over seeds. A ratio of 1 is no shift. 'before': dropout "
        "follows the first hidden layer, so batch norms 2 and 3 come behind it; 'after': it follows the third.",
    )
    text = f"Curves by epoch for both places of the dropout. At the end: {'; '.join(words)}."
    return Chart(
        name="variance-shift", title="One dropout, before and after the batch norms", panels=panels, text=text
    ), table


CLAIM = Claim(
    id="variance-shift",
    number="E13",
    title="Dropout before batch normalization shifts the variance; dropout after it does not",
    statement="Dropout makes a unit's variance in training larger than at prediction. A batch norm behind it stores "
    "the training variance and meets another one at prediction; only dropout behind every batch norm is safe.",
    source="Li et al. 2019, Understanding the disharmony between dropout and batch normalization, arXiv:1801.05134; "
    "repeated in the source S2",
    prediction="The ratio of variances behind a dropout is v/((c^2+v)/p-c^2), met within 1 %: 0.5 at p = 0.5, c = 0 "
    "and 0.3333 at c = 1. In a net the ratio is off 1 by at least 0.05 more with dropout before the batch norms, and "
    "the accuracy is lower there.",
    rules=(FORMULA, SHIFT, ACCURACY),
    settings_rule="The optimiser, rate and batch size of E1, which were chosen for a net without a norm. Three hidden "
    "layers of 128 with ReLU; one dropout of 0.5, after the first hidden layer or after the third. Same seed, same "
    "weights and batches. The formula: a million normal numbers per p and c. "
    "On FashionMNIST 6,000 training and 2,000 test images are used, drawn by class, for the sake of time.",
    meaning={
        "supported": "The variance shifts as the formula says, and a net with dropout in front of its batch norms "
        "predicts worse than one with dropout behind them. Put dropout behind the last batch norm.",
        "refuted": "At least one part does not hold here: the formula, the shift inside a net, or the loss of "
        "accuracy. The table of rules says which.",
        "inconclusive": "The parts do not decide together: an interval holds its line. On an easy data set the "
        "accuracy may not show a shift that is plainly there in the variances.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=6000, test_images=2000)},
    variants=tuple((("order", order),) for order in ORDERS),
    measure=measure,
    judge=decide,
    show=show,
)
