"""E39: trained with the batch's statistics a net generalises better than with the population's."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from ...layers import BatchNorm1d, BatchRenorm1d
from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, over_epochs
from ..data import Dataset
from ..networks import DenseNetwork
from ..premises import LEARNT, learnt
from ..rows import as_number, matched, per_seed, spread_in_words, where
from ..training import TrainingSettings, evaluate, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired

__all__ = ["CLAIM", "build"]

WAYS = {"batch": "statistics of the batch", "population": "statistics of the population"}
MATCHED = Rule(
    effect="test loss at the same training loss, trained with the batch's statistics minus with the population's",
    unit="nats",
    direction="below",
    line=0.0,
    band=(-0.01, 0.01),
)
GAP = Rule(
    effect="training minus test accuracy after the last epoch, trained with the batch's statistics minus with the "
    "population's",
    unit="",
    direction="below",
    line=0.0,
)
FIT = Rule(
    effect="log10 of the training loss after the last epoch, trained with the batch's statistics minus with the "
    "population's",
    unit="decades",
    direction="below",
    line=0.0,
)
SETTINGS = TrainingSettings(epochs=40, batch_size=64, optimizer="sgd", learning_rate=0.1, train_images=320)


def build(statistics: str) -> DenseNetwork:
    """Return three hidden layers of 128 with ReLU, normalized in training with statistics of the batch or population.

    The population's are a moving average without a start, and what batch renormalization without limits corrects the
    batch's to: the output is that of the average, and the gradient still runs through the batch.
    """
    model = DenseNetwork([128] * 3)
    layers = [
        BatchNorm1d(128)
        if statistics == "batch"
        else BatchRenorm1d(128, r_max=math.inf, d_max=math.inf, average="debiased")
        for _ in range(3)
    ]
    model.norms = nn.ModuleList(layers)
    return model


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train, and yield each epoch's losses and accuracies with stored statistics."""
    model = with_seed(lambda: build(str(dict(cell.variant)["statistics"])), cell.seed)
    images, labels = dataset.train_images.to(cell.device), dataset.train_labels.to(cell.device)
    for epoch in train(model, dataset, cell.settings, cell.seed, cell.device):
        fit_loss, train_accuracy = evaluate(model, images, labels)
        yield {
            "fit_loss": fit_loss,
            "train_accuracy": train_accuracy,
            **asdict(replace(epoch, step_losses=())),
        }


def _gap(run: Sequence[Row]) -> float:
    return as_number(run[-1]["train_accuracy"]) - as_number(run[-1]["test_accuracy"])


def _fit(run: Sequence[Row]) -> float:
    return math.log10(as_number(run[-1]["fit_loss"]))


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the test loss where both sides fit equally well; beside it the gap and the fit at the end."""
    batch, population = (where(rows, statistics=way) for way in WAYS)
    return conclude(
        paired(MATCHED, *matched(batch, population, fit="fit_loss", read="test_loss")),
        premises=[learnt(batch, population)],
        details=[
            paired(GAP, per_seed(batch, _gap), per_seed(population, _gap)),
            paired(FIT, per_seed(batch, _fit), per_seed(population, _fit)),
        ],
        compared="trained with statistics of the batch against those of the population",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show both losses by epoch."""
    ways = [way for way in WAYS if where(rows, statistics=way)]
    panels = [
        Panel(
            title=title,
            x_label="epoch",
            y_label="cross-entropy",
            marks=[
                over_epochs(where(rows, statistics=way), column, label=WAYS[way], **look)
                for way, look in zip(
                    ways, looks(["batch" if way == "batch" else "renorm" for way in ways]), strict=True
                )
            ],
        )
        for title, column in (("Training loss", "fit_loss"), ("Test loss", "test_loss"))
    ]
    lines = []
    for way in ways:
        last = per_seed(where(rows, statistics=way), lambda run: as_number(run[-1]["test_loss"]))
        accuracy = per_seed(where(rows, statistics=way), lambda run: as_number(run[-1]["test_accuracy"]))
        fit = per_seed(where(rows, statistics=way), lambda run: as_number(run[-1]["fit_loss"]))
        lines.append([WAYS[way], *(spread_in_words(list(column.values())) for column in (fit, last, accuracy))])
    table = Table(
        title="After the last epoch",
        header=["trained with", "training loss", "test loss", "test accuracy"],
        rows=lines,
        note="Mean ± standard deviation over seeds. Losses and accuracy are taken with stored statistics on both "
        "sides.",
    )
    words = "; ".join(f"{line[0]}: training loss {line[1]}, test loss {line[2]}" for line in lines)
    text = f"Curves of training and test loss by epoch. At the end: {words}."
    return Chart(name="batch-statistics", title="Statistics of training", panels=panels, text=text), table


CLAIM = Claim(
    id="batch-statistics",
    number="E39",
    title="At the same training loss, statistics of the batch give a lower test loss than the population's",
    statement="Normalized in training with the statistics of its batch, which vary from step to step, a net is "
    "regularized; normalized with those of the population it is not, and generalises less well.",
    source="Luo, Wang, Shao and Peng 2019, Towards understanding regularization in batch normalization, "
    "arXiv:1809.00846, which compares batch with population normalization",
    prediction="At the same training loss the test loss is lower after training with the batch's statistics than after "
    "training with the population's; within 0.01 is no difference. Beside it: the gap in accuracy after the last epoch "
    "is smaller, and whether the training loss is then lower too.",
    question=MATCHED,
    premises=(LEARNT,),
    details=(GAP, FIT),
    settings_rule="Three hidden layers of 128 with ReLU on few training images, so that there is a gap: 320 of digits, "
    "1024 of FashionMNIST. The population's statistics are a moving average of the batches' with momentum 0.1, without "
    "a trace of its start; batch renormalization without limits normalizes with it, while the gradient runs through "
    "the batch. Plain gradient descent on batches of 64 at a rate of 0.1: of 0.03, 0.1 and 0.3 the largest at which "
    "both sides train, tried on the seeds 1001 and 1002, which no judged run has; at 0.3 the side of the population "
    "diverges. Compared is the test loss at the lowest training loss that both sides reach, both losses taken with "
    "stored statistics and read between the epochs.",
    meaning={
        "supported": "Fitted equally well, the net trained with its batches' statistics does better on the test data: "
        "their noise regularizes.",
        "refuted": "Fitted equally well, the net trained with the population's statistics does better on the test "
        "data.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={
        "digits": SETTINGS,
        "fashion-mnist": replace(SETTINGS, epochs=30, train_images=1024, test_images=2000),
    },
    variants=tuple((("statistics", way),) for way in WAYS),
    measure=measure,
    judge=decide,
    show=show,
)
