"""E13: dropout before a batch norm spoils the statistics that it predicts with."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...layers import BatchNorm1d
from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, over_epochs
from ..data import Dataset
from ..images import as_bits, share_won
from ..networks import DenseNetwork
from ..premises import LEARNT, learnt
from ..probes import probe, recorded, retaken
from ..rows import as_number, mean_and_spread, mean_of, per_seed, where
from ..training import TrainingSettings, classified_rightly, seeded, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "variance_ratio"]

FORMULA = Rule(
    effect="distance of the measured variance ratio from v/((c^2+v)/p-c^2), relative, mean over p and c",
    unit="",
    direction="below",
    line=0.01,
)
SHIFT = Rule(
    effect="distance of the variance ratio from 1, mean over batch norms, dropout before them minus dropout after them",
    unit="",
    direction="above",
    line=0.05,
)
ACCURACY = Rule(
    effect="test accuracy averaged over the epochs, statistics taken without dropout minus with it, dropout before two "
    "of three batch norms",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.002, 0.002),
)
HARMLESS = Rule(
    effect="test accuracy averaged over the epochs, statistics taken without dropout minus with it, dropout after "
    "every batch norm",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.002, 0.002),
)
WON = Rule(
    effect="share that statistics taken without dropout classify rightly of the test images that only they or those "
    "taken with it do, all epochs together, dropout before two of three batch norms",
    unit="",
    direction="above",
    line=0.5,
)
SPARED = Rule(
    effect="test accuracy gained by statistics taken without dropout, dropout before two batch norms minus after all",
    unit="",
    direction="above",
    line=0.0,
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
    test = dataset.test_images.to(cell.device), dataset.test_labels.to(cell.device)
    # The masks are drawn from torch's own random numbers.
    with seeded(cell.seed, cell.device):
        for epoch in train(model, dataset, cell.settings, cell.seed, cell.device):
            images = dataset.train_images[:6000].to(cell.device)
            predicted: dict[str, float | str] = {}
            for way, dropout in (("training", True), ("prediction", False)):
                with retaken(model, images, cell.settings.batch_size, dropout=dropout) as copied:
                    right = classified_rightly(copied, *test)
                predicted |= {f"{way}_accuracy": int(right.sum()) / len(right), f"{way}_right": as_bits(right)}
            ratios = _ratios(model, images[:2000])
            kept = asdict(replace(epoch, step_losses=()))
            yield {**kept, **predicted, "ratios": ratios, "formula": formula}


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
    stored, again = (
        {order: per_seed(side, partial(mean_of, column)) for order, side in sides.items()}
        for column in ("training_accuracy", "prediction_accuracy")
    )
    gained = {
        order: {seed: again[order][seed] - accuracy for seed, accuracy in stored[order].items()} for order in ORDERS
    }
    return conclude(
        paired(ACCURACY, again["before"], stored["before"]),
        premises=[learnt(*sides.values())],
        details=[
            single(WON, per_seed(sides["before"], partial(share_won, "prediction_right", "training_right"))),
            paired(HARMLESS, again["after"], stored["after"]),
            paired(SPARED, gained["before"], gained["after"]),
            paired(SHIFT, shift["before"], shift["after"]),
            single(FORMULA, formula),
        ],
        compared="statistics taken without dropout against those with it, in the same nets",
    )


ACCURACIES = {
    "as stored": "test_accuracy",
    "taken with dropout": "training_accuracy",
    "taken without": "prediction_accuracy",
}
RATIOS = {f"batch norm {place + 1}": f"ratio_{place}" for place in range(3)}


def _with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Give every ratio a column of its own."""
    return [{**row, **{f"ratio_{place}": ratio for place, ratio in enumerate(row["ratios"])}} for row in rows]


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show accuracy and test loss by epoch for both orders, and the ratios as a table."""
    sides = {order: where(rows, order=order) for order in ORDERS if where(rows, order=order)}
    panels = [
        Panel(
            title=title,
            x_label="epoch",
            y_label=unit,
            marks=[
                over_epochs(side, column, label=label, **look)
                for (label, column), look in zip(columns.items(), looks(["batch"] * len(columns)), strict=True)
            ],
        )
        for title, unit, side, columns in (
            *((f"Dropout {order} the batch norms", "test accuracy", side, ACCURACIES) for order, side in sides.items()),
            *(
                (f"Variances, dropout {order}", "prediction over training", _with_ratios(side), RATIOS)
                for order, side in sides.items()
            ),
        )
    ]
    lines, words = [], []
    for order, side in sides.items():
        last = [run for run in side if run["epoch"] == side[-1]["epoch"]]
        ratios = [mean_and_spread([as_number(row["ratios"][place]) for row in last]) for place in range(3)]
        accuracies = [mean_and_spread([as_number(row[column]) for row in last]) for column in ACCURACIES.values()]
        accuracy = accuracies[0]
        lines.append([order, *(f"{mean:.3f} ± {spread:.3f}" for mean, spread in [*ratios, *accuracies])])
        words.append(
            f"with dropout {order}, ratios {', '.join(f'{mean:.3f}' for mean, _ in ratios)} and accuracy "
            f"{accuracy[0]:.4f}"
        )
    table = Table(
        title="Variance at prediction over variance in training",
        header=["dropout", "batch norm 1", "batch norm 2", "batch norm 3", *(f"accuracy, {way}" for way in ACCURACIES)],
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
    title="Dropout before batch normalization spoils the statistics it predicts with",
    statement="Dropout makes a unit's variance in training larger than at prediction. A batch norm behind it stores "
    "the training variance and meets another one at prediction; only dropout behind every batch norm is safe.",
    source="Li et al. 2019, Understanding the disharmony between dropout and batch normalization, arXiv:1801.05134; "
    "repeated in the source S2",
    prediction="In a net with dropout before its batch norms, predicting with statistics that were taken without "
    "dropout gives a higher test accuracy than with those of training, the weights being the same; within a fifth of a "
    "point is no difference. Beside it: with dropout after all batch norms there is none. In the first net the ratio "
    "of variances is off 1 by at least 0.05 more. There, of the images that only one way gets right, most are those of "
    "the statistics without dropout. Behind a dropout the ratio is v/((c^2+v)/p-c^2), met within 1 %: 0.5 at p = "
    "0.5, c = 0 and 0.3333 at c = 1.",
    question=ACCURACY,
    premises=(LEARNT,),
    details=(WON, HARMLESS, SPARED, SHIFT, FORMULA),
    design=3,
    settings_rule="The optimiser, rate and batch size of E1, which were chosen for a net without a norm. Three hidden "
    "layers of 128 with ReLU; one dropout of 0.5, after the first hidden layer or after the third. After every epoch "
    "the statistics are taken twice from the training images, weights held, as plain averages over batches: with the "
    "dropout of training, and without. The formula: a million normal numbers per p and c. On FashionMNIST 6,000 "
    "training and 2,000 test images are used, drawn by class, for the sake of time.",
    meaning={
        "supported": "The statistics that a batch norm takes behind a dropout are not those it meets at prediction, "
        "and that costs accuracy. Take them again without dropout, or put dropout behind the last batch norm.",
        "refuted": "In this net predicting with the statistics of training, dropout included, is the better way.",
        "inconclusive": "The interval holds the line: a shift that is plainly there in the variances may not show in "
        "the accuracy.",
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
