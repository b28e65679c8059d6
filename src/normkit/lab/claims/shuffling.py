"""E30: the noise of the batch helps only where a sample's mates change from epoch to epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import GhostBatchNorm1d
from ..charts import Chart, Line, Panel, Table, norm_colour
from ..claim import Cell, Claim, Row
from ..curves import norm_label, over_epochs
from ..data import Dataset
from ..networks import DenseNetwork
from ..premises import LEARNT, learnt
from ..rows import matched, mean_of, of_norm, per_seed, spread_in_words, where
from ..search import RATE_RULE, best_rate
from ..training import TrainingSettings, evaluate, large_batch, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired

__all__ = ["CLAIM", "build", "grouped"]

# Every step takes 64 images; the norms take their statistics from parts of 8, the mates.
BATCH, PART = 64, 8
LATE = 10
RATES = (0.03, 0.1, 0.3)
MATES = {"new": "other mates in every epoch", "fixed": "the same mates in every epoch"}
HELPS = Rule(
    effect="test accuracy, mean over the last ten epochs, with the norm, mates that change minus mates that stay",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.005, 0.005),
)
PLAIN = Rule(
    effect="test accuracy, mean over the last ten epochs, without a norm, company that changes minus company that "
    "stays",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.005, 0.005),
)
MATCHED = Rule(
    effect="test loss at the same training loss, with the norm, mates that change minus mates that stay",
    unit="nats",
    direction="below",
    line=0.0,
    band=(-0.01, 0.01),
)
SETTINGS = TrainingSettings(epochs=40, batch_size=BATCH, optimizer="sgd", learning_rate=0.0, train_images=320)


def build(norm: str) -> DenseNetwork:
    """Return three hidden layers of 128 with ReLU; batch norms take their statistics from parts of the batch."""
    model = DenseNetwork([128] * 3)
    if norm == "batch":
        model.norms = nn.ModuleList(GhostBatchNorm1d(128, ghost_size=PART) for _ in range(3))
    return model


def grouped(dataset: Dataset, seed: int) -> Dataset:
    """Return the data set with its training images in groups of 8 that stay together; left-over images are left out."""
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(seed))
    groups = order[: len(order) // PART * PART].view(-1, PART)
    return replace(dataset, train_images=dataset.train_images[groups], train_labels=dataset.train_labels[groups])


def _ungrouped(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Take a step of groups as one of images: parts of 8 consecutive images are the groups."""
    return large_batch(model, images.flatten(0, 1), labels.flatten())


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train with mates that change or stay, the same number of images in every step."""
    rate = best_rate(build, cell.norm, dataset, cell.settings, RATES, cell.device)
    settings = replace(cell.settings, learning_rate=rate)
    model = with_seed(lambda: build(cell.norm), cell.seed)
    images, labels = dataset.train_images.to(cell.device), dataset.train_labels.to(cell.device)
    if dict(cell.variant)["mates"] == "fixed":
        together = replace(settings, batch_size=max(settings.batch_size // PART, 1))
        epochs = train(
            model, grouped(dataset, cell.seed), together, cell.seed, cell.device, gradients=_ungrouped
        )  # fmt: skip
    else:
        epochs = train(model, dataset, settings, cell.seed, cell.device)
    for epoch in epochs:
        fit_loss, train_accuracy = evaluate(model, images, labels)
        yield {
            "rate": rate,
            "epoch": epoch.epoch,
            "fit_loss": fit_loss,
            "train_accuracy": train_accuracy,
            "test_loss": epoch.test_loss,
            "test_accuracy": epoch.test_accuracy,
        }


def _late(column: str, run: Sequence[Row]) -> float:
    """Return the mean of a column over the last epochs: one epoch's hangs on how far the moving averages lag then."""
    return mean_of(column, run[-LATE:])


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge both sides of the net with the norm; beside it the plain net's, and the loss at the same fit."""
    sides = {(norm, mates): where(of_norm(rows, norm), mates=mates) for norm in ("batch", "none") for mates in MATES}
    new, fixed = sides["batch", "new"], sides["batch", "fixed"]
    accuracy = partial(_late, "test_accuracy")
    return conclude(
        paired(HELPS, per_seed(new, accuracy), per_seed(fixed, accuracy)),
        premises=[learnt(new, fixed)],
        details=[
            paired(PLAIN, *(per_seed(sides["none", mates], accuracy) for mates in MATES)),
            paired(MATCHED, *matched(new, fixed, fit="fit_loss", read="test_loss")),
        ],
        compared="mates that change against mates that stay",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show test loss and accuracy by epoch, for both norms and both kinds of mates."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    sides = [(norm, mates) for norm in norms for mates in MATES if where(of_norm(rows, norm), mates=mates)]

    def line(norm: str, mates: str, column: str) -> Line:
        mine = where(of_norm(rows, norm), mates=mates)
        label = f"{norm_label(norm)}, {mates} mates"
        return over_epochs(mine, column, label=label, colour=norm_colour(norm), dashed=mates == "fixed")

    panels = [
        Panel(title=title, x_label="epoch", y_label=unit, marks=[line(*side, column) for side in sides])
        for column, title, unit in (
            ("test_loss", "Test loss", "cross-entropy"),
            ("test_accuracy", "Test accuracy", "accuracy"),
        )
    ]
    lines = []
    for norm, mates in sides:
        mine = where(of_norm(rows, norm), mates=mates)
        cells = [
            spread_in_words(list(per_seed(mine, partial(_late, column)).values()))
            for column in ("fit_loss", "test_loss", "test_accuracy")
        ]
        lines.append([norm, MATES[mates], f"{mine[0]['rate']:g}", *cells])
    table = Table(
        title=f"Mean over the last {LATE} epochs",
        header=["norm", "mates", "learning rate", "training loss", "test loss", "test accuracy"],
        rows=lines,
        note=f"Mean ± standard deviation over seeds. Every step takes {BATCH} images in every row; the norms take "
        f"their statistics from parts of {PART}.",
    )
    words = "; ".join(f"{norm_label(line[0])}, {line[1]}: test loss {line[4]}, accuracy {line[5]}" for line in lines)
    text = f"Curves by epoch of test loss and accuracy. Mean over the last {LATE} epochs: {words}."
    return Chart(name="shuffling", title="Mates that change, and mates that stay", panels=panels, text=text), table


CLAIM = Claim(
    id="shuffling",
    number="E30",
    title="Batch normalization generalises better where a sample's mates change from epoch to epoch",
    statement="The noise of the batch acts like augmentation because a sample meets other mates in every epoch: for "
    "that the training data must be shuffled anew.",
    source="The source S2, on batch normalization and overfitting",
    prediction="Over the last 10 epochs the test accuracy of the net with the norm is higher with mates that change "
    "than with mates that stay; within 0.005 is no difference. Beside it: whether that is so without a norm too, "
    "and whether the test loss is lower at the same training loss.",
    question=HELPS,
    premises=(LEARNT,),
    details=(PLAIN, MATCHED),
    settings_rule="Three hidden layers of 128 with ReLU on few training images, so that there is a gap: 320 of digits, "
    f"1024 of FashionMNIST. Every step takes {BATCH} images, and the norms take their statistics from {PART} "
    "consecutive ones. On one side those stay together through all epochs, while the order of the groups changes; on "
    "the other every image is shuffled for itself. So the noise of the gradient is nearly the same, and the mates are "
    f"not. Plain gradient descent at 0.03, 0.1 or 0.3, searched with mates that change. {RATE_RULE} The loss at the "
    "same fit is read at the lowest training loss that both sides reach, both with stored statistics.",
    meaning={
        "supported": "The net whose mates change does better on the test data. Shuffle anew in every epoch; a fixed "
        "set of batches loses part of what the norm's noise gives.",
        "refuted": "The net whose mates stay is the more accurate one on the test data: mates that change are not what "
        "makes it so. Its test loss may be the higher one all the same; the details say.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    any_norm=False,
    seeds=5,
    settings={
        "digits": SETTINGS,
        "fashion-mnist": replace(SETTINGS, epochs=30, train_images=1024, test_images=2000),
    },
    variants=tuple((("mates", mates),) for mates in MATES),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
