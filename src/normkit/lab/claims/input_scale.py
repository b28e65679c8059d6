"""E29: a net with batch normalization learns from raw pixels as well as from standardised ones."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import norm_label, over_epochs
from ..data import Dataset
from ..premises import LEARNT, learnt
from ..rows import compared_norms, last_accuracies, of_norm, spread_in_words, where
from ..search import RATE_RULE, train_at_best_rate
from ..small_network import SmallLeNet
from ..training import TrainingSettings
from ..verdicts import Rule, Verdict, conclude, paired

__all__ = ["CLAIM", "as_pixels"]

RATES = (0.001, 0.01, 0.1)
INPUTS = {"standardised": "standardised", "pixels": "pixels of 0 to 255"}
COSTS = Rule(
    effect="test accuracy after the last epoch, standardised input minus pixels of 0 to 255, with the norm",
    unit="",
    direction="below",
    line=0.01,
)
NEEDED = Rule(
    effect="test accuracy after the last epoch, standardised input minus pixels of 0 to 255, without a norm",
    unit="",
    direction="above",
    line=0.01,
)
LESS = Rule(
    effect="test accuracy lost with pixels of 0 to 255, with the norm minus without",
    unit="",
    direction="below",
    line=0.0,
)
SETTINGS = TrainingSettings(epochs=4, batch_size=64, optimizer="sgd", learning_rate=0.0, momentum=0.9)


@lru_cache(maxsize=8)
def as_pixels(dataset: Dataset) -> Dataset:
    """Return the data set with every image as it came: from 0, the training images' lowest value, to 255."""
    low, high = (float(end) for end in dataset.train_images.aminmax())

    def stretched(images: Tensor) -> Tensor:
        return (images - low) * (255 / (high - low))

    return replace(
        dataset,
        train_images=stretched(dataset.train_images),
        test_images=stretched(dataset.test_images),
        whole=None if dataset.whole is None else as_pixels(dataset.whole),
    )


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train the small LeNet on images of the cell's scale, at the best rate of its norm and that scale."""
    seen = as_pixels(dataset) if dict(cell.variant)["input"] == "pixels" else dataset
    yield from train_at_best_rate(SmallLeNet, cell, seen, RATES)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge what raw pixels cost the net with the norm, where they cost the plain net something."""
    candidate, baseline = compared_norms(rows)
    sides = {
        (norm, scale): where(of_norm(rows, norm), input=scale) for norm in (candidate, baseline) for scale in INPUTS
    }
    accuracies = {side: last_accuracies(run) for side, run in sides.items()}
    lost = []
    for norm in (candidate, baseline):
        usual, raw = (accuracies[norm, scale] for scale in INPUTS)
        lost.append({seed: usual[seed] - raw[seed] for seed in sorted(usual.keys() & raw.keys())})
    return conclude(
        paired(COSTS, *(accuracies[candidate, scale] for scale in INPUTS)),
        premises=[
            learnt(*(sides[norm, "standardised"] for norm in (candidate, baseline))),
            paired(NEEDED, *(accuracies[baseline, scale] for scale in INPUTS)),
        ],
        details=[paired(LESS, *lost)],
        compared=f"pixels against standardised input, with {candidate} norm",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the accuracy by epoch for both inputs, without and with the norm."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    panels = [
        Panel(
            title=norm_label(norm).capitalize(),
            x_label="epoch",
            y_label="share right",
            marks=[
                over_epochs(where(of_norm(rows, norm), input=scale), "test_accuracy", label=label, colour=colour)
                for colour, (scale, label) in enumerate(INPUTS.items())
                if where(of_norm(rows, norm), input=scale)
            ],
        )
        for norm in norms
    ]
    lines = []
    for norm in norms:
        for scale, label in INPUTS.items():
            mine = where(of_norm(rows, norm), input=scale)
            if mine:
                accuracy = spread_in_words(list(last_accuracies(mine).values()))
                lines.append([norm, label, f"{mine[0]['rate']:g}", accuracy])
    table = Table(
        title="Test accuracy after the last epoch",
        header=["norm", "input", "learning rate", "test accuracy"],
        rows=lines,
        note="Mean ± standard deviation over seeds.",
    )
    words = "; ".join(f"{norm_label(line[0])}, {line[1]}: {line[3]}" for line in lines)
    text = f"Curves of the test accuracy by epoch for both inputs. After the last epoch: {words}."
    return Chart(name="input-scale", title="Standardised input and raw pixels", panels=panels, text=text), table


CLAIM = Claim(
    id="input-scale",
    number="E29",
    title="With batch normalization the input data need not be standardised",
    statement="Before training the input data must be standardised. A net whose first layer is followed by batch "
    "normalization does that by itself: the scale and the mean of its input drop out behind the norm.",
    source="That the input must be standardised: the sources S1 and S3; that batch normalization makes it superfluous "
    "follows from its invariance (Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.3)",
    prediction="With pixels of 0 to 255 in the place of standardised ones the net with the norm loses less than one "
    "point of test accuracy, each input at its best rate. Beside it: it loses less than the net without a norm.",
    question=COSTS,
    premises=(LEARNT, NEEDED),
    details=(LESS,),
    settings_rule="A small LeNet with strides, momentum 0.9; a side is a norm with an input, from 0.001, 0.01 or 0.1. "
    f"{RATE_RULE} Taken for granted is that raw pixels cost the plain net more than one point.",
    meaning={
        "supported": "Raw pixels cost the net with the norm less than a point, and the plain net more. Standardise all "
        "the same: the first layer's rate is then of the order of the others'.",
        "refuted": "Raw pixels cost the net with the norm a point or more. The output behind the first norm is the "
        "same, but the gradient of the weights before it follows the scale of the input.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=3000, test_images=2000)},
    variants=tuple((("input", scale),) for scale in INPUTS),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
