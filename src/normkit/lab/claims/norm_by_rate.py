"""E36: most of what batch normalization gains comes from the larger learning rate that it allows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..charts import Bars, Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label
from ..data import Dataset
from ..networks import DenseNetwork, he_initialized
from ..premises import LEARNT, learnt
from ..rows import late_accuracies, mean_and_spread, of_norm, per_seed, spread_in_words, where
from ..search import RATE_RULE, best_rate, train_at_rate
from ..training import TrainingSettings
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "build"]

RATES = (0.01, 0.03, 0.1)
OWNERS = {"plain": "the plain net's best rate", "normed": "the normalized net's best rate"}
MOST = Rule(
    effect="test accuracy, mean over the last three epochs, what the norm's rate adds to the normalized net minus "
    "what the norm adds at the plain net's rate",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.005, 0.005),
)
LEADS = Rule(
    effect="test accuracy, mean over the last three epochs, each side at its own best rate, with the norm minus "
    "without",
    unit="",
    direction="above",
    line=0.0,
)
RAISES = Rule(
    effect="log2 of the normalized net's best rate over the plain net's",
    unit="octaves",
    direction="above",
    line=0.5,
)
LITTLE = Rule(
    effect="test accuracy, mean over the last three epochs, at the plain net's best rate, with the norm minus without",
    unit="",
    direction="below",
    line=0.005,
)
BEARS = Rule(
    effect="test accuracy, mean over the last three epochs, at the normalized net's best rate, with the norm minus "
    "without",
    unit="",
    direction="above",
    line=0.0,
)
SETTINGS = TrainingSettings(epochs=6, batch_size=64, optimizer="sgd", learning_rate=0.0)


def build(norm: str) -> DenseNetwork:
    """Return ten hidden layers of 100 with ReLU and He's initial weights, with which the plain net trains too."""
    return he_initialized(DenseNetwork([100] * 10, norm))


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train the cell's net at the rate that is best for one of the two nets."""
    owner = "none" if dict(cell.variant)["rate_of"] == "plain" else "batch"
    rate = best_rate(build, owner, dataset, cell.settings, RATES, cell.device)
    return train_at_rate(rate, build, cell, dataset)


def _octave(run: Sequence[Row]) -> float:
    return math.log2(run[0]["rate"])


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge which adds more, the norm at the plain net's rate or the rate to the normalized net."""
    runs = {(norm, owner): where(of_norm(rows, norm), rate_of=owner) for norm in ("none", "batch") for owner in OWNERS}
    accuracy = {side: late_accuracies(run) for side, run in runs.items()}
    both, at_small, plain = accuracy["batch", "normed"], accuracy["batch", "plain"], accuracy["none", "plain"]
    seeds = sorted(both.keys() & at_small.keys() & plain.keys())
    by_rate = {seed: both[seed] - at_small[seed] for seed in seeds}
    by_norm = {seed: at_small[seed] - plain[seed] for seed in seeds}
    return conclude(
        paired(MOST, by_rate, by_norm),
        premises=[
            learnt(runs["batch", "normed"], runs["none", "plain"]),
            paired(RAISES, *(per_seed(runs["batch", owner], _octave) for owner in ("normed", "plain"))),
            paired(LEADS, both, plain),
        ],
        details=[single(LITTLE, by_norm), paired(BEARS, both, accuracy["none", "normed"])],
        compared="the rate's part against the norm's",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the four accuracies."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    marks, lines = [], []
    for norm, look in zip(norms, looks(norms), strict=True):
        runs = [where(of_norm(rows, norm), rate_of=owner) for owner in OWNERS]
        accuracies = [list(late_accuracies(run).values()) for run in runs]
        spreads = [mean_and_spread(values) if values else (0.0, 0.0) for values in accuracies]
        marks.append(
            Bars(
                label=norm_label(norm),
                categories=list(OWNERS.values()),
                heights=[mean for mean, _ in spreads],
                low=[mean - spread for mean, spread in spreads],
                high=[mean + spread for mean, spread in spreads],
                **look,
            )
        )
        lines.append(
            [
                norm,
                *(
                    f"{spread_in_words(values)} ({run[0]['rate']:g})" if run else ""
                    for run, values in zip(runs, accuracies, strict=True)
                ),
            ]
        )
    panel = Panel(title="Test accuracy, last three epochs", x_label="learning rate", y_label="accuracy", marks=marks)
    table = Table(
        title="Test accuracy, mean over the last three epochs (and the rate)",
        header=["norm", *OWNERS.values()],
        rows=lines,
        note="Mean ± standard deviation over seeds.",
    )
    words = "; ".join(f"{norm_label(line[0])}: {' and '.join(line[1:])}" for line in lines)
    text = f"Bars of the test accuracy over the last three epochs at {' and at '.join(OWNERS.values())}. {words}."
    return Chart(name="norm-by-rate", title="Norm and rate, two by two", panels=(panel,), text=text), table


CLAIM = Claim(
    id="norm-by-rate",
    number="E36",
    title="Most of batch normalization's lead comes from the larger learning rate that it allows",
    statement="At a learning rate that a net without a norm can bear, batch normalization gains little; it is the "
    "larger rate, which only the normalized net bears, that brings faster training and better generalization.",
    source="Bjorck, Gomes, Selman and Weinberger 2018, Understanding batch normalization, arXiv:1806.02375",
    prediction="Going from the plain net at its best rate to the normalized net at its own, the step in the rate "
    "adds more test accuracy than the step in the norm; within 0.005 of each other is no difference. Beside it: at "
    "the plain net's rate the norm adds less than 0.005, and at the normalized net's rate the plain net is behind.",
    question=MOST,
    premises=(LEARNT, RAISES, LEADS),
    details=(LITTLE, BEARS),
    settings_rule="Ten hidden layers of 100 with ReLU and He's initial weights, plain gradient descent; both nets "
    f"at both nets' best rates, from 0.01, 0.03 or 0.1. {RATE_RULE} Taken for granted is that the normalized net's "
    "best rate is the larger one, and that it leads at all.",
    meaning={
        "supported": "The larger rate brought more than the norm did at the plain net's rate. Whoever adds the norm "
        "and leaves the rate as it was has less than half of it.",
        "refuted": "The norm brought more at the plain net's own rate than the larger rate did on top: here it is not "
        "the rate.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=3000, test_images=2000)},
    variants=tuple((("rate_of", owner),) for owner in OWNERS),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
