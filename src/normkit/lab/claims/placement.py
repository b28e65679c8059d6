"""E17: batch normalization goes before the activation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_epochs
from ..data import Dataset
from ..premises import LEARNT, learnt
from ..rows import compared_norms, last_accuracies, of_norm, spread_in_words, where
from ..search import RATE_RULE, train_at_best_rate
from ..small_network import SmallLeNet
from ..training import TrainingSettings
from ..verdicts import Rule, Verdict, conclude, paired

__all__ = ["CLAIM"]

BUILDS: Mapping[str, Callable[[str], nn.Module]] = {
    "before": partial(SmallLeNet, norm_after_activation=False),
    "after": partial(SmallLeNet, norm_after_activation=True),
}
RATES = (0.03, 0.1, 0.3)
BEFORE = Rule(
    effect="test accuracy after the last epoch, norm before the activation minus norm after it",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.01, 0.01),
)
SETTINGS = TrainingSettings(
    epochs=20, batch_size=32, optimizer="sgd", learning_rate=0.0, momentum=0.9, train_images=500
)  # fmt: skip


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train the small LeNet with its norms in the cell's place, at that place's best rate."""
    return train_at_best_rate(BUILDS[str(dict(cell.variant)["place"])], cell, dataset, RATES)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the difference of the two places, for batch norm where it was run."""
    norm, _ = compared_norms(rows)
    sides = [where(of_norm(rows, norm), place=place) for place in BUILDS]
    return conclude(
        paired(BEFORE, *map(last_accuracies, sides)),
        premises=[learnt(*sides)],
        compared=f"{norm} norm before against after the activation",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show accuracy and training loss by epoch for both places."""
    sides = [
        (norm, place, where(of_norm(rows, norm), place=place))
        for norm in dict.fromkeys(row["norm"] for row in rows)
        for place in BUILDS
        if where(of_norm(rows, norm), place=place)
    ]
    panels = [
        Panel(
            title=title,
            x_label="epoch",
            y_label=unit,
            marks=[
                over_epochs(mine, column, label=f"{norm_label(norm)}, {place} ReLU", **look)
                for (norm, place, mine), look in zip(sides, looks([norm for norm, _, _ in sides]), strict=True)
            ],
        )
        for title, unit, column in (
            ("Test accuracy", "accuracy", "test_accuracy"),
            ("Training loss", "cross-entropy", "train_loss"),
        )
    ]
    lines = [
        [norm, place, f"{mine[0]['rate']:g}", spread_in_words(list(last_accuracies(mine).values()))]
        for norm, place, mine in sides
    ]
    table = Table(
        title="Test accuracy after the last epoch, by the norm's place",
        header=["norm", "place", "rate chosen", "test accuracy"],
        rows=lines,
        note=f"Mean ± standard deviation over seeds. Rates tried: {', '.join(f'{rate:g}' for rate in RATES)}.",
    )
    words = "; ".join(f"{line[0]} norm {line[1]} the activation {line[3]}" for line in lines)
    text = f"Accuracy and training loss by epoch for both places of the norm. Last test accuracy: {words}."
    return Chart(name="placement", title="The norm before and after the activation", panels=panels, text=text), table


CLAIM = Claim(
    id="placement",
    number="E17",
    title="Batch normalization before the activation classifies better than after it",
    statement="The norm belongs between the linear layer and its activation: there it adjusts what the activation "
    "takes in, and the net classifies better than with the norm behind the activation.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.2; repeated in the sources S2 and S4",
    prediction="The test accuracy with the norm before ReLU is higher than behind it: the difference is above 0; "
    "within a point is no difference. No source gives a number.",
    question=BEFORE,
    premises=(LEARNT,),
    design=2,
    settings_rule="A small LeNet (two convolutions, one hidden dense layer, a norm at each) and few training images, "
    "so that accuracies leave room for a difference. Gradient descent with momentum 0.9 on batches of 32 at a rate of "
    f"0.03, 0.1 or 0.3. {RATE_RULE}",
    meaning={
        "supported": "In this net the place before ReLU is the better one, each place at its own best rate. It says "
        "nothing about residual nets, where the place decides what the shortcut carries.",
        "refuted": "In this net the norm behind ReLU does better. The usual place is a convention that other reasons "
        "may keep (folding a norm into the convolution before it, for one), not a gain in accuracy.",
        "inconclusive": "The difference is smaller than the spread over seeds lets one see. Whichever place is taken, "
        "no large gain or loss hangs on it in this net.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, epochs=10, train_images=2000, test_images=2000)},
    variants=tuple((("place", place),) for place in BUILDS),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
