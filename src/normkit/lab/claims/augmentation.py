"""E16: with batch normalization images need to be distorted less."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from torch import nn

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_variants
from ..data import Dataset
from ..distortion import Distortion
from ..premises import LEARNT, learnt
from ..rows import as_number, compared_norms, last_accuracies, of_norm, spread_in_words, where
from ..search import RATE_RULE, train_at_best_rate
from ..small_network import SmallLeNet
from ..training import TrainingSettings
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "build", "gains"]

STRENGTHS = (0.0, 0.5, 1.0)
RATES = (0.03, 0.1, 0.3)
HELPS = Rule(
    effect="test accuracy gained by distortion, mean over the strengths, without the norm",
    unit="",
    direction="above",
    line=0.0,
)
LESS = Rule(
    effect="test accuracy gained by distortion, mean over the strengths, with the norm minus without",
    unit="",
    direction="below",
    line=-0.005,
    band=(-0.005, 0.005),
)
SETTINGS = TrainingSettings(
    epochs=15, batch_size=32, optimizer="sgd", learning_rate=0.0, momentum=0.9, train_images=300
)


def build(strength: float, norm: str) -> nn.Module:
    """Return the small LeNet behind distortion of this strength; with strength 0 it sees the images as they are."""
    return nn.Sequential(Distortion(strength), SmallLeNet(norm))


BUILDS: Mapping[float, Callable[[str], nn.Module]] = {strength: partial(build, strength) for strength in STRENGTHS}


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train on images distorted as the cell says, at that side's best rate."""
    return train_at_best_rate(BUILDS[float(dict(cell.variant)["strength"])], cell, dataset, RATES)


def gains(rows: Sequence[Row]) -> dict[int, float]:
    """Return each seed's gain: its accuracy with distortion, in the mean over strengths, minus that without."""
    alone = last_accuracies(where(rows, strength=0.0))
    distorted = [last_accuracies(where(rows, strength=strength)) for strength in STRENGTHS[1:]]
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
            ("Test accuracy, last epoch", "share right", "test_accuracy"),
            ("Training loss, last epoch", "cross-entropy", "train_loss"),
        )
    ]
    lines = []
    for norm in norms:
        mine = {strength: where(of_norm(last, norm), strength=strength) for strength in STRENGTHS}
        cells = [
            f"{spread_in_words(list(last_accuracies(part).values()))} ({part[0]['rate']:g})" if part else "not run"
            for part in mine.values()
        ]
        lines.append([norm, *cells, spread_in_words(list(gains(of_norm(rows, norm)).values()))])
    table = Table(
        title="Test accuracy after the last epoch (and the rate chosen), by strength of the distortion",
        header=["norm", *(f"strength {strength:g}" for strength in STRENGTHS), "gained by distortion"],
        rows=lines,
        note="Mean ± standard deviation over seeds. Strength 1: up to 30 degrees, 4 pixels, half the contrast and half "
        f"a deviation of brightness. Rates tried: {', '.join(f'{rate:g}' for rate in RATES)}.",
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
    design=2,
    settings_rule="A small LeNet (two convolutions, one hidden dense layer) and few training images, where distortion "
    "has most to give. Each image of a batch is turned, shifted and changed in contrast and brightness at a strength "
    "of 0, 0.5 or 1. Gradient descent with momentum 0.9 on batches of 32 at a rate of 0.03, 0.1 or 0.3. A side is a "
    f"norm with a strength. {RATE_RULE}",
    meaning={
        "supported": "Distortion gains less where batch normalization is in the net. The norm does some of the work "
        "that distorted images do, or the net needs fewer passes over the data.",
        "refuted": "Batch normalization does not take over what distortion does: the net with it gains as much from "
        "distorted images as the net without, to within half a point, or more. Keep the augmentation.",
        "inconclusive": "The line is inside the interval: the gains differ too much from seed to seed. More seeds make "
        "the interval narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, epochs=8, train_images=1200, test_images=2000)},
    variants=tuple((("strength", strength),) for strength in STRENGTHS),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
