"""E37: a scalar that starts at 0 in every residual branch trains a deep net as batch normalization does."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, over_epochs
from ..data import Dataset
from ..networks import he_initialized, norm_layer
from ..premises import LEARNT, learnt
from ..rows import late_accuracies, spread_in_words, where
from ..search import RATE_RULE, train_at_best_rate
from ..training import TrainingSettings
from ..verdicts import Rule, Verdict, conclude, paired

__all__ = ["CLAIM", "DeepResidual", "build"]

BLOCKS = 30
WIDTH = 64
RATES = (0.003, 0.01, 0.03)
BRANCHES = {"batch": "batch norm", "skip-init": "scalar that starts at 0", "plain": "neither"}
LITTLE = 0.02
AS_GOOD = Rule(
    effect="test accuracy, mean over the last three epochs, scalar that starts at 0 minus batch norm",
    unit="",
    direction="above",
    line=-LITTLE,
)
NEEDED = Rule(
    effect="test accuracy, mean over the last three epochs, batch norm minus neither",
    unit="",
    direction="above",
    line=LITTLE,
)
HELPS = Rule(
    effect="test accuracy, mean over the last three epochs, scalar that starts at 0 minus neither",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.005, 0.005),
)
SETTINGS = TrainingSettings(epochs=6, batch_size=64, optimizer="sgd", learning_rate=0.0, momentum=0.9)


class DeepResidual(nn.Module):
    """A deep net of dense residual blocks, ``x + branch(x)``, with He's initial weights.

    A branch is ``norm relu dense norm relu dense``, as in De and Smith 2020, and is multiplied by a number that is
    learnt and starts at 0 where there is one.

    Args:
        branch: ``"batch"``, ``"skip-init"`` or ``"plain"``.

    Shape:
        Input ``(N, 1, 28, 28)``, output ``(N, 10)``.

    >>> DeepResidual("skip-init")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, branch: str) -> None:
        super().__init__()
        norm = "batch" if branch == "batch" else "none"
        self.first = nn.Linear(28 * 28, WIDTH)
        self.branches = nn.ModuleList(
            nn.Sequential(
                norm_layer(norm, WIDTH, dimensions=0), nn.ReLU(), nn.Linear(WIDTH, WIDTH),
                norm_layer(norm, WIDTH, dimensions=0), nn.ReLU(), nn.Linear(WIDTH, WIDTH),
            )
            for _ in range(BLOCKS)
        )  # fmt: skip
        self.scales = nn.Parameter(torch.zeros(BLOCKS)) if branch == "skip-init" else None
        self.last_norm = norm_layer(norm, WIDTH, dimensions=0)
        self.head = nn.Linear(WIDTH, 10)
        he_initialized(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        x = self.first(images.flatten(1))
        for place, branch in enumerate(self.branches):
            put_out = branch(x)
            x = x + (put_out if self.scales is None else self.scales[place] * put_out)
        logits: Tensor = self.head(functional.relu(self.last_norm(x)))
        return logits


def build(norm: str, branch: str) -> DeepResidual:
    """Return the net with this kind of branch; the norm's name is the claim's, and has no part in it."""
    return DeepResidual(branch)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train the net with the cell's branches at their best rate."""
    side = partial(build, branch=str(dict(cell.variant)["branch"]))
    return train_at_best_rate(side, cell, dataset, RATES)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the scalar against batch norm, where a net with neither is behind."""
    sides = {branch: where(rows, branch=branch) for branch in BRANCHES}
    accuracies = {branch: late_accuracies(side) for branch, side in sides.items()}
    return conclude(
        paired(AS_GOOD, accuracies["skip-init"], accuracies["batch"]),
        premises=[learnt(sides["batch"]), paired(NEEDED, accuracies["batch"], accuracies["plain"])],
        details=[paired(HELPS, accuracies["skip-init"], accuracies["plain"])],
        compared="scalar that starts at 0 against batch norm",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show training loss and accuracy by epoch."""
    branches = [branch for branch in BRANCHES if where(rows, branch=branch)]
    panels = [
        Panel(
            title=title,
            x_label="epoch",
            y_label=unit,
            marks=[
                over_epochs(where(rows, branch=branch), column, label=BRANCHES[branch], **look)
                for branch, look in zip(
                    branches, looks(["batch" if branch == "batch" else "none" for branch in branches]), strict=True
                )
            ],
        )
        for title, unit, column in (
            ("Training loss", "cross-entropy", "train_loss"),
            ("Test accuracy", "accuracy", "test_accuracy"),
        )
    ]
    lines = []
    for branch in branches:
        mine = where(rows, branch=branch)
        accuracy = spread_in_words(list(late_accuracies(mine).values()))
        lines.append([BRANCHES[branch], f"{mine[0]['rate']:g}", accuracy])
    table = Table(
        title="Test accuracy, mean over the last three epochs",
        header=["branches with", "learning rate", "test accuracy"],
        rows=lines,
        note=f"Mean ± standard deviation over seeds. {BLOCKS} residual blocks of two dense layers.",
    )
    words = "; ".join(f"{line[0]}: {line[2]}" for line in lines)
    text = f"Curves by epoch of training loss and test accuracy. Accuracy over the last three: {words}."
    return Chart(name="skip-init", title="A deep residual net without a norm", panels=panels, text=text), table


CLAIM = Claim(
    id="skip-init",
    number="E37",
    title="A scalar that starts at 0 in every branch trains a deep residual net as well as batch normalization",
    statement="What batch normalization does for a deep residual net at the start is to make its branches small beside "
    "their shortcuts. One learnt number per branch that starts at 0 does the same, and trains such nets as well.",
    source="De and Smith 2020, Batch normalization biases residual blocks towards the identity function in deep "
    "networks, arXiv:2002.10444 (SkipInit)",
    prediction=f"With {BLOCKS} blocks the test accuracy over the last three epochs with a scalar that starts at 0 is "
    "less than two points below that with batch norm. Beside it: it is higher than with neither.",
    question=AS_GOOD,
    premises=(LEARNT, NEEDED),
    details=(HELPS,),
    settings_rule="Dense residual blocks of width 64 with He's initial weights; a side is what the branches have, from "
    f"0.003, 0.01 or 0.03 with momentum 0.9. {RATE_RULE} Taken for granted is that batch norm leads the net with "
    "neither by more than two points.",
    meaning={
        "supported": "The scalar trains the deep net as well as the norm, to within two points. For depth alone a "
        "residual net needs no statistics of the batch.",
        "refuted": "The scalar stays two points or more behind the norm: small branches are not all that the norm "
        "gives here.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=3000, test_images=2000)},
    variants=tuple((("branch", branch),) for branch in BRANCHES),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
