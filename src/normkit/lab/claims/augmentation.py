"""E16: with batch normalization images need to be distorted less."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from torch import nn

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_variants
from ..data import Dataset
from ..distortion import Distortion, distorted_once
from ..networks import DenseNetwork
from ..premises import LEARNT, learnt
from ..rows import as_number, compared_norms, of_norm, per_seed, spread_in_words, where
from ..training import TrainingSettings, seeded, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "build", "gains"]

STRENGTHS = (0.0, 0.5, 1.0)
# How loosely the images themselves are placed and lit, training and test alike.
LOOSE = 1.0
# At a constant rate the accuracy moves from epoch to epoch: it is read as the mean over so many.
LATE = 10
HELPS = Rule(
    effect="test accuracy of the last ten epochs gained by distortion, mean over the strengths, without the norm",
    unit="",
    direction="above",
    line=0.0,
)
LESS = Rule(
    effect="test accuracy of the last ten epochs gained by distortion, mean over the strengths, with the norm minus "
    "without",
    unit="",
    direction="below",
    line=-0.005,
    band=(-0.005, 0.005),
)
SETTINGS = TrainingSettings(epochs=60, batch_size=32, optimizer="sgd", learning_rate=0.1, train_images=300)


def build(strength: float, norm: str) -> nn.Module:
    """Return two hidden layers of 256 behind distortion of this strength; with 0 they see the images as they are."""
    return nn.Sequential(Distortion(strength), DenseNetwork([256] * 2, norm))


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train on loosely placed images, distorted as the cell says in every step; yield loss and accuracies by epoch."""
    loose = distorted_once(dataset, LOOSE, cell.seed)
    model = with_seed(lambda: build(float(dict(cell.variant)["strength"]), cell.norm), cell.seed)
    late: deque[float] = deque(maxlen=LATE)
    with seeded(cell.seed, cell.device):
        for epoch in train(model, loose, cell.settings, cell.seed, cell.device):
            late.append(epoch.test_accuracy)
            yield {
                "epoch": epoch.epoch,
                "train_loss": epoch.train_loss,
                "test_accuracy": epoch.test_accuracy,
                "late_accuracy": fmean(late),
            }


def _late(rows: Sequence[Row]) -> dict[int, float]:
    return per_seed(rows, partial(_only, "late_accuracy"))


def gains(rows: Sequence[Row]) -> dict[int, float]:
    """Return each seed's gain: its accuracy with distortion, in the mean over strengths, minus that without."""
    alone = _late(where(rows, strength=0.0))
    distorted = [_late(where(rows, strength=strength)) for strength in STRENGTHS[1:]]
    seeds = set(alone).intersection(*distorted)
    return {seed: fmean(accuracy[seed] for accuracy in distorted) - alone[seed] for seed in sorted(seeds)}


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the difference between the gains of both sides."""
    candidate, baseline = compared_norms(rows)
    sides = [gains(of_norm(rows, norm)) for norm in (candidate, baseline)]
    return conclude(
        paired(LESS, *sides),
        premises=[learnt(*(of_norm(rows, norm) for norm in (candidate, baseline))), single(HELPS, sides[1])],
        compared=f"{candidate} against {baseline}",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show test accuracy and training loss against the strength of the distortion."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    panels = [
        Panel(
            title=title,
            x_label="strength of the distortion",
            y_label=unit,
            marks=[
                over_variants(of_norm(last, norm), "strength", partial(_only, column), label=norm_label(norm), **look)
                for norm, look in zip(norms, looks(norms), strict=True)
            ],
            x_ticks=STRENGTHS,
        )
        for title, unit, column in (
            ("Test accuracy, last ten epochs", "accuracy", "late_accuracy"),
            ("Training loss, last epoch", "cross-entropy", "train_loss"),
        )
    ]
    lines = []
    for norm in norms:
        mine = {strength: where(of_norm(last, norm), strength=strength) for strength in STRENGTHS}
        cells = [spread_in_words(list(_late(part).values())) for part in mine.values()]
        lines.append([norm, *cells, spread_in_words(list(gains(of_norm(rows, norm)).values()))])
    table = Table(
        title="Test accuracy of the last ten epochs, by strength of the distortion",
        header=["norm", *(f"strength {strength:g}" for strength in STRENGTHS), "gained by distortion"],
        rows=lines,
        note="Mean ± standard deviation over seeds. Strength 1: up to 30 degrees, 4 pixels, half the contrast and half "
        "a deviation of brightness.",
    )
    words = "; ".join(f"{norm_label(line[0])} {line[-1]}" for line in lines)
    text = f"Accuracy and training loss against the strength of the distortion. Gained by it: {words}."
    return Chart(name="augmentation", title="What distorted images bring", panels=panels, text=text), table


def _only(column: str, run: Sequence[Row]) -> float:
    return as_number(run[-1][column])


CLAIM = Claim(
    id="augmentation",
    number="E16",
    title="Distorted images gain less test accuracy with batch normalization",
    statement="A net with batch normalization needs less augmentation by distorted images: leaving the distortion out "
    "costs it less than it costs the net without a norm.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, section 4.2.1 (reduce the photometric distortions); repeated in "
    "the source S4",
    prediction="The test accuracy that distortion gains is smaller with batch normalization by more than 0.5 "
    "percentage points. No source gives a number; half a point is the line that claim convergence takes too, and "
    "within half a point is no difference. The premise: distortion helps the net without a norm.",
    question=LESS,
    premises=(LEARNT, HELPS),
    design=3,
    settings_rule="Two hidden layers of 256 with ReLU, which know nothing of shifts and turns, and few training "
    "images (300 of digits, 1000 of FashionMNIST). All images, training and test, are turned, shifted and changed "
    "in contrast and brightness once, at a strength of 1: the pictures of these data sets are centred and lit "
    "alike, and there distortion gained the plain net little or nothing, in a dense and in two convolutional nets, "
    "with right and with partly wrong labels. In training each image of a batch is distorted again in every step, "
    "at a strength of 0, 0.5 or 1. Plain gradient descent on batches of 32 at a constant rate of 0.1 on both sides; "
    "at a constant rate the accuracy moves from epoch to epoch, so the mean of the last ten is judged. Net, images "
    "and rate were chosen before any net with a norm was trained, by the gain of distortion in the plain net alone, "
    "on the seeds 1001 and 1002, which no judged run has.",
    meaning={
        "supported": "Distortion gains less where batch normalization is in the net. The norm does some of the work "
        "that distorted images do, or the net needs fewer passes over the data.",
        "refuted": "Batch normalization does not take over what distortion does: the net with it gains as much from "
        "distorted images as the net without, or at most half a point less. Keep the augmentation.",
        "inconclusive": "The line is inside the interval: the gains differ too much from seed to seed. More seeds make "
        "the interval narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=1000, test_images=2000)},
    variants=tuple((("strength", strength),) for strength in STRENGTHS),
    keeps_last=True,
    measure=measure,
    judge=decide,
    show=show,
)
