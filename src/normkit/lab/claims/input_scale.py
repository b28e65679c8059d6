"""E29: a net with batch normalization learns from raw pixels as well as from standardised ones."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_epochs
from ..data import Dataset
from ..premises import LEARNT, learnt
from ..rows import compared_norms, late_accuracies, of_norm, spread_in_words, where
from ..search import RATE_RULE, best_rate, train_at_rate
from ..small_network import SmallLeNet
from ..training import TrainingSettings
from ..verdicts import Rule, Verdict, conclude, paired

__all__ = ["CLAIM", "as_pixels"]

RATES = (0.001, 0.01, 0.1)
INPUTS = {
    "standardised": "standardised",
    "pixels": "pixels, same rate",
    "pixels-own-rate": "pixels, their own best rate",
}
COSTS = Rule(
    effect="test accuracy, mean over the last three epochs, standardised input minus pixels of 0 to 255 at the same "
    "rate, with the norm",
    unit="",
    direction="below",
    line=0.01,
)
NEEDED = Rule(
    effect="test accuracy, mean over the last three epochs, standardised input minus pixels of 0 to 255 at the same "
    "rate, without a norm",
    unit="",
    direction="above",
    line=0.01,
)
OWN_RATE = Rule(
    effect="test accuracy, mean over the last three epochs, standardised input minus pixels of 0 to 255 at their own "
    "best rate, with the norm",
    unit="",
    direction="below",
    line=0.01,
)
PLAIN_OWN_RATE = Rule(
    effect="test accuracy, mean over the last three epochs, standardised input minus pixels of 0 to 255 at their own "
    "best rate, without a norm",
    unit="",
    direction="above",
    line=0.01,
)
SETTINGS = TrainingSettings(epochs=6, batch_size=64, optimizer="sgd", learning_rate=0.0, momentum=0.9)


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
    """Train the small LeNet on the cell's images, at the rate that is best for standardised ones or for these."""
    given = str(dict(cell.variant)["input"])
    seen = dataset if given == "standardised" else as_pixels(dataset)
    chosen_on = seen if given == "pixels-own-rate" else dataset
    rate = best_rate(SmallLeNet, cell.norm, chosen_on, cell.settings, RATES, cell.device)
    return train_at_rate(rate, SmallLeNet, cell, seen)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge what raw pixels cost the net with the norm, where they cost the plain net something."""
    candidate, baseline = compared_norms(rows)
    usual, same, own = (
        {norm: late_accuracies(where(of_norm(rows, norm), input=given)) for norm in (candidate, baseline)}
        for given in INPUTS
    )
    standardised = where(rows, input="standardised")
    return conclude(
        paired(COSTS, usual[candidate], same[candidate]),
        premises=[
            learnt(*(of_norm(standardised, norm) for norm in (candidate, baseline))),
            paired(NEEDED, usual[baseline], same[baseline]),
        ],
        details=[
            paired(OWN_RATE, usual[candidate], own[candidate]),
            paired(PLAIN_OWN_RATE, usual[baseline], own[baseline]),
        ],
        compared=f"pixels against standardised input, with {candidate} norm",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the accuracy by epoch for both inputs, without and with the norm."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    panels = [
        Panel(
            title=norm_label(norm).capitalize(),
            x_label="epoch",
            y_label="accuracy",
            marks=[
                over_epochs(where(of_norm(rows, norm), input=scale), "test_accuracy", label=label, **look)
                for (scale, label), look in zip(INPUTS.items(), looks([norm] * len(INPUTS)), strict=True)
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
                accuracy = spread_in_words(list(late_accuracies(mine).values()))
                lines.append([norm, label, f"{mine[0]['rate']:g}", accuracy])
    table = Table(
        title="Test accuracy, mean over the last three epochs",
        header=["norm", "input", "learning rate", "test accuracy"],
        rows=lines,
        note="Mean ± standard deviation over seeds.",
    )
    words = "; ".join(f"{norm_label(line[0])}, {line[1]}: {line[3]}" for line in lines)
    text = f"Curves of the test accuracy by epoch for both inputs. Over the last three: {words}."
    return Chart(name="input-scale", title="Standardised input and raw pixels", panels=panels, text=text), table


CLAIM = Claim(
    id="input-scale",
    number="E29",
    title="With batch normalization the input data need not be standardised",
    statement="Before training the input data must be standardised. A net whose first layer is followed by batch "
    "normalization does that by itself: the scale and the mean of its input drop out behind the norm.",
    source="That the input must be standardised: the sources S1 and S3; that batch normalization makes it superfluous "
    "follows from its invariance (Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.3)",
    prediction="With pixels of 0 to 255 in the place of standardised ones, at the rate that is best for those, the net "
    "with the norm loses less than one point of test accuracy. Beside it: so it does with a rate of their own, with "
    "which the plain net still loses more than one.",
    question=COSTS,
    premises=(LEARNT, NEEDED),
    details=(OWN_RATE, PLAIN_OWN_RATE),
    settings_rule="A small LeNet with strides, momentum 0.9; a side is a norm, from 0.001, 0.01 or 0.1 on standardised "
    f"input. {RATE_RULE} Beside that raw pixels are given a rate that is searched with them. Taken for granted is that "
    "at the same rate raw pixels cost the plain net more than one point.",
    meaning={
        "supported": "Raw pixels at the same rate cost the net with the norm less than a point, and the plain net "
        "more. The norm standardises what it is given, also behind the first layer.",
        "refuted": "Raw pixels at the same rate cost the net with the norm a point or more. The output behind the "
        "first norm is the same, but the gradient of the weights before it follows the scale of the input.",
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
