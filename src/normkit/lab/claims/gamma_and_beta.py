"""E28: without gamma and beta a normalized net of sigmoids fits less."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, over_epochs
from ..data import Dataset
from ..networks import DenseNetwork
from ..premises import LEARNT, learnt
from ..probes import probe, recorded
from ..rows import as_number, last_accuracies, per_seed, spread_in_words, where
from ..training import TrainingSettings, evaluate, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "at_best_fit", "build", "explained_by_a_line"]

LAYERS = 3
RATES = (0.1, 0.3, 1.0, 3.0)
FITS = Rule(
    effect="training loss after the last epoch, the lowest over the rates, without gamma and beta minus with them",
    unit="nats",
    direction="above",
    line=0.0,
    band=(-0.01, 0.01),
)
LINEAR = Rule(
    effect="share of the sigmoids' variance that a line in their input explains, mean over layers, at that rate, "
    "without gamma and beta",
    unit="",
    direction="above",
    line=0.95,
)
BENT = Rule(
    effect="share of the sigmoids' variance that a line in their input explains, mean over layers, at that rate, with "
    "gamma and beta minus without",
    unit="",
    direction="below",
    line=0.0,
)
ACCURACY = Rule(
    effect="test accuracy after the last epoch, at that rate, with gamma and beta minus without",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.005, 0.005),
)
SETTINGS = TrainingSettings(epochs=30, batch_size=60, optimizer="sgd", learning_rate=0.0)
WAYS = {"yes": "with gamma and beta", "no": "without"}


def build(norm: str, learns: str) -> DenseNetwork:
    """Return three hidden layers of 100 sigmoids whose norms learn gamma and beta, or keep them at 1 and 0."""
    model = DenseNetwork([100] * LAYERS, norm, activation="sigmoid")
    if learns == "no":
        model.norms.requires_grad_(False)
    return model


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train at the cell's rate; yield each epoch's fit, and how straight the sigmoids are where their inputs lie."""
    variant = dict(cell.variant)
    settings = replace(cell.settings, learning_rate=float(variant["rate"]))
    model = with_seed(lambda: build(cell.norm, str(variant["learns"])), cell.seed)
    images, labels = dataset.train_images.to(cell.device), dataset.train_labels.to(cell.device)
    for epoch in train(model, dataset, settings, cell.seed, cell.device):
        fit_loss, _ = evaluate(model, images, labels)
        yield {
            "epoch": epoch.epoch,
            "fit_loss": fit_loss,
            "test_accuracy": epoch.test_accuracy,
            "straight": _straight(model, images[:1000]),
        }


def _straight(model: nn.Module, images: Tensor) -> float:
    """Return the mean over layers of what a line explains of the sigmoids, with the batch's own statistics."""
    names = [f"norms.{place}" for place in range(LAYERS)]
    with probe(model) as copied, recorded(copied, names) as seen, torch.no_grad():
        copied.train()
        copied(images)
    return fmean(explained_by_a_line(seen[name][1]) for name in names)


def explained_by_a_line(inputs: Tensor) -> float:
    """Return how much of the variance of the sigmoids of ``(N, C)`` a line per unit explains, mean over units.

    The squared correlation of input and output; of a standard normal 0.98.

    >>> x = torch.linspace(-0.01, 0.01, 1001)[:, None]
    >>> round(explained_by_a_line(x), 6), round(explained_by_a_line(1e6 * x), 2)
    (1.0, 0.75)
    """
    x = inputs.double()
    y = x.sigmoid()
    x, y = x - x.mean(0), y - y.mean(0)
    # A unit that does not vary has nothing to explain: 0, not a division by it.
    between = x.square().sum(0) * y.square().sum(0)
    return float(((x * y).sum(0).square() / between.clamp_min(1e-300)).mean())


def _last(column: str, run: Sequence[Row]) -> float:
    return as_number(run[-1][column])


def _last_fit(run: Sequence[Row]) -> float:
    """Return the last training loss, which is beyond all others where it is not finite."""
    loss = _last("fit_loss", run)
    return loss if math.isfinite(loss) else math.inf


def at_best_fit(rows: Sequence[Row]) -> list[Row]:
    """Return, for every seed that was run at all rates, the rows of the rate with the lowest last training loss."""
    chosen: list[Row] = []
    for seed in sorted({row["seed"] for row in rows}):
        runs = [where(rows, seed=seed, rate=rate) for rate in RATES]
        if all(runs):
            best = min(runs, key=_last_fit)
            chosen.extend(best)
    return chosen


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge what is fitted without gamma and beta; beside it, how straight the sigmoids are."""
    having, lacking = (at_best_fit(where(rows, learns=learns)) for learns in WAYS)
    fits = [per_seed(side, partial(_last, "fit_loss")) for side in (lacking, having)]
    straight = [per_seed(side, partial(_last, "straight")) for side in (having, lacking)]
    return conclude(
        paired(FITS, *fits),
        premises=[learnt(having)],
        details=[
            single(LINEAR, straight[1]),
            paired(BENT, *straight),
            paired(ACCURACY, last_accuracies(having), last_accuracies(lacking)),
        ],
        compared="without gamma and beta against with them",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show fit, accuracy and straightness by epoch, each side at the rate that fits best, and the fit at every rate."""
    best = {way: at_best_fit(where(rows, learns=way)) for way in WAYS}
    ways = [way for way in WAYS if best[way]]
    columns = {
        "fit_loss": ("Training loss", "cross-entropy"),
        "test_accuracy": ("Test accuracy", "accuracy"),
        "straight": ("How straight the sigmoids are", "share explained by a line"),
    }
    panels = [
        Panel(
            title=title,
            x_label="epoch",
            y_label=unit,
            marks=[
                over_epochs(best[way], column, label=WAYS[way], **look)
                for way, look in zip(ways, looks(["batch"] * len(ways)), strict=True)
            ],
        )
        for column, (title, unit) in columns.items()
    ]
    lines = []
    for way in ways:
        for rate in RATES:
            mine = where(rows, learns=way, rate=rate)
            cells = [spread_in_words(list(per_seed(mine, partial(_last, column)).values())) for column in columns]
            lines.append([WAYS[way], f"{rate:g}", *cells])
    table = Table(
        title="After the last epoch",
        header=["norms", "learning rate", "training loss", "test accuracy", "explained by a line"],
        rows=lines,
        note="Mean ± standard deviation over seeds. Of a standard normal input a line explains 0.98 of the sigmoid.",
    )
    words = "; ".join(f"{line[0]}, rate {line[1]}: training loss {line[2]}, accuracy {line[3]}" for line in lines)
    text = f"Curves by epoch of training loss, test accuracy and straightness, at the rate that fits best. {words}."
    return Chart(name="gamma-and-beta", title="What gamma and beta are for", panels=panels, text=text), table


CLAIM = Claim(
    id="gamma-and-beta",
    number="E28",
    title="Without gamma and beta a normalized net of sigmoids fits its training data less",
    statement="Normalizing alone lowers what a net can express: a sigmoid's inputs fall into its nearly linear part. "
    "Gamma and beta, which are learnt, give it back.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, section 3; repeated in the sources S1, S2 and S3",
    prediction="After the last epoch the training loss is higher without gamma and beta, each side at the one of "
    "four rates that fits best; within 0.01 is no difference. Beside it: without them a line explains more than 95 "
    "% of what the sigmoids do, with them less than without, and the test accuracy is higher with them.",
    question=FITS,
    premises=(LEARNT,),
    details=(LINEAR, BENT, ACCURACY),
    settings_rule="Three hidden layers of 100 sigmoids with torch's initial weights, plain gradient descent. Gamma and "
    "beta stay at 1 and 0 on one side; initial weights and batches are the same. As the question is what can be "
    "fitted, each side of each seed is taken at the rate, of 0.1, 0.3, 1 and 3, at which its last training loss is "
    "lowest; that loss is taken with stored statistics. The test data have no part in it.",
    meaning={
        "supported": "With gamma and beta the net fitted its training data better. Leave them out only where a layer "
        "behind the norm has a scale and a shift of its own and no sigmoid lies between.",
        "refuted": "The net fitted better without gamma and beta. The weights of the next layer, which can scale and "
        "shift too, made up for what is lost in these epochs.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=3000, test_images=2000)},
    variants=tuple((("learns", way), ("rate", rate)) for way in WAYS for rate in RATES),
    measure=measure,
    judge=decide,
    show=show,
)
