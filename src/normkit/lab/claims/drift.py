"""E3: batch normalization halves how far the distributions of the layers' inputs move while the net learns."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, median
from typing import Any

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_epochs
from ..data import Dataset
from ..networks import LeNet5, he_initialized
from ..premises import LEARNT, learnt
from ..probes import drift, input_moments
from ..rows import as_number, compared_norms, of_norm, per_seed, spread_in_words
from ..training import TrainingSettings, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "LAYERS", "decades"]

# Layers whose input the net makes itself: the first convolution takes in images, which do not move.
LAYERS = ("conv2", "fc1", "fc2", "fc3")
# A drift of nothing has no logarithm.
LEAST = 1e-6
STILLER = Rule(
    effect="log10 of the drift of the layer inputs' mean from epoch to epoch, median over layers and over the epochs "
    "from the second, with the norm minus without",
    unit="decades",
    direction="below",
    line=-math.log10(2),
)
SCALE = Rule(
    effect="log10 of the drift of the layer inputs' deviation from epoch to epoch, median over layers and over the "
    "epochs from the second, with the norm minus without",
    unit="decades",
    direction="below",
    line=-math.log10(2),
)
MOVES = Rule(
    effect="drift of the layer inputs' mean over the last epoch without a norm, median over layers",
    unit="deviations",
    direction="above",
    line=0.05,
)
SETTINGS = TrainingSettings(epochs=8, batch_size=64, optimizer="adam", learning_rate=0.002)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train LeNet-5 and yield, per epoch, how far each layer's input has moved since the epoch before."""
    model = with_seed(lambda: he_initialized(LeNet5(cell.norm)), cell.seed).to(cell.device)
    images = dataset.train_images[:1000].to(cell.device)
    before = input_moments(model, LAYERS, images)
    for epoch in train(model, dataset, cell.settings, cell.seed, cell.device):
        after = input_moments(model, LAYERS, images)
        means, deviations = drift(before, after)
        before = after
        yield {
            "epoch": epoch.epoch,
            "test_accuracy": epoch.test_accuracy,
            "means": means,
            "mean": fmean(means),
            "deviations": deviations,
            "deviation": fmean(deviations),
        }


def decades(column: str, run: Sequence[Row]) -> float:
    """Return log10 of how far the layers' inputs move in an epoch: the median over layers and over epochs.

    The first epoch is left out: it starts from random weights, in whose units every step is large.
    """
    moved = [median(as_number(value) for value in row[f"{column}s"]) for row in run[1:] or run]
    return math.log10(max(median(moved), LEAST))


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the drift over the whole training, and that of the last epoch without a norm."""
    candidate, baseline = compared_norms(rows)
    sides = [of_norm(rows, candidate), of_norm(rows, baseline)]
    means, deviations = (
        [per_seed(side, partial(decades, column)) for side in sides] for column in ("mean", "deviation")
    )
    still = per_seed(sides[1], lambda run: median(as_number(value) for value in run[-1]["means"]))
    return conclude(
        paired(STILLER, *means),
        premises=[learnt(*sides)],
        details=[paired(SCALE, *deviations), single(MOVES, still)],
        compared=f"{candidate} against {baseline}",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the drift of mean and deviation by epoch, the accuracy beside it, and the drift of each layer."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    panels = [
        Panel(
            title=title,
            x_label="epoch",
            y_label=unit,
            marks=[
                over_epochs(of_norm(rows, norm), column, label=norm_label(norm), **look)
                for norm, look in zip(norms, looks(norms), strict=True)
            ],
            log_y=column != "test_accuracy",
        )
        for title, unit, column in (
            ("Drift of the mean", "deviations per epoch", "mean"),
            ("Drift of the deviation", "share per epoch", "deviation"),
            ("Test accuracy", "accuracy", "test_accuracy"),
        )
    ]
    lines = []
    for norm in norms:
        for column, name in (("means", "mean"), ("deviations", "deviation")):
            mine = of_norm(rows, norm)
            layers = [list(per_seed(mine, partial(_of_layer, column, place)).values()) for place in range(len(LAYERS))]
            lines.append([norm, name, *(spread_in_words(values, 3) for values in layers)])
    table = Table(
        title="Drift from epoch to epoch of what each layer takes in, median over the epochs from the second",
        header=["norm", "of the", *LAYERS],
        rows=lines,
        note="Mean ± standard deviation over seeds, in units of the deviation the input had before; 1000 training "
        "images, statistics of their batch.",
    )
    words = "; ".join(f"{norm_label(line[0])}, {line[1]}: {', '.join(line[2:])}" for line in lines)
    text = f"Curves by epoch of how far the layers' inputs move, and of the accuracy. By layer {', '.join(LAYERS)}: "
    return Chart(name="drift", title="How far the layers' inputs move", panels=panels, text=f"{text}{words}."), table


def _of_layer(column: str, place: int, run: Sequence[Row]) -> float:
    return median(as_number(row[column][place]) for row in run[1:] or run)


CLAIM = Claim(
    id="drift",
    number="E3",
    title="Batch normalization halves how far the means of the layers' inputs move from epoch to epoch",
    statement="While the parameters of the layers below change, the mean and the scale of what a layer takes in keep "
    "moving (internal covariate shift); batch normalization holds them.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, sections 1 and 4.1; repeated in the sources S0 to S4",
    prediction="From one epoch to the next, the first left out, the mean of a layer's inputs moves less than half as "
    "far with batch normalization. Beside it: the same of their deviation, and that without a norm the mean still "
    "moves by more than 0.05 deviations in the last epoch.",
    question=STILLER,
    premises=(LEARNT,),
    details=(SCALE, MOVES),
    design=2,
    settings_rule="LeNet-5 with E1's optimiser, rate and batch size, chosen for the net without a norm. Measured is "
    "what the layer takes in, behind norm, activation and pooling, by channel, in units of its deviation before. "
    "Images are standardised, and the weights start at He's variance, so that no unit is tiny at the start.",
    meaning={
        "supported": "The norm holds the mean of the layers' inputs, as its authors say. Whether that is why "
        "it trains better is another question: see the claim covariate-shift.",
        "refuted": "The norm does not halve the movement of the inputs' mean in this net: held by the batch's "
        "statistics before the activation, what the next layer takes in still moves behind it.",
        "inconclusive": "An interval holds its line, or too few seeds were run. More seeds make the intervals "
        "narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={
        "digits": SETTINGS,
        "fashion-mnist": replace(SETTINGS, epochs=5, train_images=6000, test_images=2000),
    },
    measure=measure,
    judge=decide,
    show=show,
)
