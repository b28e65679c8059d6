"""E15: with batch normalization local response normalization is not needed, and it does little anyway."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..charts import Chart, Line, Panel, Table
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
    "no": partial(SmallLeNet, response=False),
    "yes": partial(SmallLeNet, response=True),
}
RATES = (0.03, 0.1, 0.3)
LITTLE = 0.01
NOT_NEEDED = Rule(
    effect="test accuracy after the last epoch, norm and local response norm minus the norm alone",
    unit="",
    direction="below",
    line=LITTLE,
)
HELPS = Rule(
    effect="test accuracy after the last epoch, local response norm alone minus no norm",
    unit="",
    direction="above",
    line=0.0,
)
DOES_LITTLE = Rule(
    effect="test accuracy after the last epoch, local response norm alone minus no norm",
    unit="",
    direction="below",
    line=LITTLE,
)
SETTINGS = TrainingSettings(
    epochs=10, batch_size=32, optimizer="sgd", learning_rate=0.0, momentum=0.9, train_images=500
)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train the small LeNet with or without local response norms, at that side's best rate."""
    return train_at_best_rate(BUILDS[str(dict(cell.variant)["response"])], cell, dataset, RATES)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge what local response norm adds, with the norm and without one."""
    candidate, baseline = compared_norms(rows)
    sides = {norm: [where(of_norm(rows, norm), response=it) for it in ("yes", "no")] for norm in (candidate, baseline)}
    return conclude(
        paired(NOT_NEEDED, *map(last_accuracies, sides[candidate])),
        premises=[learnt(*sides[candidate]), paired(HELPS, *map(last_accuracies, sides[baseline]))],
        details=[paired(DOES_LITTLE, *map(last_accuracies, sides[baseline]))],
        compared=f"local response norm added to {candidate} and to {baseline}",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show accuracy by epoch with and without local response norm, one panel per norm."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    panels, lines = [], []
    for norm in norms:
        marks: list[Line] = []
        for response, look in zip(BUILDS, looks([norm] * len(BUILDS)), strict=True):
            mine = where(of_norm(rows, norm), response=response)
            if mine:
                label = "with local response norm" if response == "yes" else "without"
                marks.append(over_epochs(mine, "test_accuracy", label=label, **look))
                accuracy = spread_in_words(list(last_accuracies(mine).values()))
                lines.append([norm, response, f"{mine[0]['rate']:g}", accuracy])
        panels.append(
            Panel(title=norm_label(norm).capitalize(), x_label="epoch", y_label="test accuracy", marks=marks)
        )  # fmt: skip
    table = Table(
        title="Test accuracy after the last epoch",
        header=["norm", "local response norm", "rate chosen", "test accuracy"],
        rows=lines,
        note=f"Mean ± standard deviation over seeds. Rates tried: {', '.join(f'{rate:g}' for rate in RATES)}.",
    )
    words = "; ".join(
        f"{norm_label(line[0])} {'and with' if line[1] == 'yes' else 'and no'} local response norm {line[3]}"
        for line in lines
    )
    text = f"Test accuracy by epoch, one panel per norm. After the last epoch: {words}."
    title = "What local response norm adds"
    return Chart(name="response-norm", title=title, panels=panels, text=text), table


CLAIM = Claim(
    id="response-norm",
    number="E15",
    title="Local response normalization is not needed with batch normalization",
    statement="A net with batch normalization can leave local response normalization out, and the latter does little "
    "even where it is alone.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, section 4.2.1; repeated in the sources S3 and S4. Against the "
    "second half: Krizhevsky, Sutskever and Hinton 2012, section 3.3, who report 1.4 points less top-1 error with it",
    prediction="Beside batch normalization local response norm raises test accuracy by less than 1 percentage point. "
    "The premise: without the norm it raises it. Beside it: by less than a point there too.",
    question=NOT_NEEDED,
    premises=(LEARNT, HELPS),
    details=(DOES_LITTLE,),
    design=2,
    settings_rule="A small LeNet (two convolutions, one hidden dense layer) and few training images, so that there is "
    "room for a gain. Local response norm stands behind the ReLU of each convolution with AlexNet's constants "
    "(n = 5, k = 2, alpha = 1e-4, beta = 0.75). Gradient descent with momentum 0.9 on batches of 32 at a rate of 0.03, "
    f"0.1 or 0.3. {RATE_RULE}",
    meaning={
        "supported": "In this net local response norm brings less than a point beside batch normalization. "
        "With AlexNet's constants it is close to a constant factor on activations of this size, so little was there "
        "to be gained.",
        "refuted": "In this net local response norm brings a point or more beside batch normalization.",
        "inconclusive": "A gain of one point is inside an interval: the spread over seeds is too wide to rule it out. "
        "More seeds make the intervals narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, epochs=5, train_images=2000, test_images=2000)},
    variants=tuple((("response", response),) for response in BUILDS),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
