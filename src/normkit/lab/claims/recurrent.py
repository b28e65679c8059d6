"""E31: layer normalization trains a recurrent net better than batch normalization does."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_epochs
from ..data import Dataset
from ..networks import norm_layer
from ..premises import LEARNT, learnt
from ..probes import probe
from ..rows import late_accuracies, of_norm, spread_in_words
from ..training import TrainingSettings, evaluate, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired

__all__ = ["CLAIM", "RowReader"]

HIDDEN = 64
STEPS = 28
# So many batches fill the statistics of a layer that all steps share.
FILLING = 20
LAYER = Rule(
    effect="test accuracy, mean over the last three epochs, layer norm minus batch norm with statistics for every "
    "time step",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.01, 0.01),
)
HELPS = Rule(
    effect="test accuracy, mean over the last three epochs, layer norm minus no norm",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.01, 0.01),
)
SHARED = Rule(
    effect="test accuracy, mean over the last three epochs, batch norm, statistics for every time step minus "
    "statistics that all steps share",
    unit="",
    direction="above",
    line=0.05,
)
SETTINGS = TrainingSettings(epochs=12, batch_size=64, optimizer="adam", learning_rate=0.003)


class RowReader(nn.Module):
    """A recurrent net that reads an image row by row: ``h = tanh(norm(W x + U h + b))``, and ten logits of the last h.

    Gamma and beta are the same in every time step. A batch norm has stored statistics of its own for every step, as
    Cooijmans et al. 2017 do; in training it takes those of the batch at that step.

    Args:
        norm: ``"none"`` or a name of the catalog.

    Shape:
        Input ``(N, 1, 28, 28)``, output ``(N, 10)``.

    >>> RowReader("batch")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, norm: str = "none") -> None:
        super().__init__()
        self.read = nn.Linear(28, HIDDEN)
        self.keep = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, 10)
        nn.init.orthogonal_(self.keep.weight)
        self.norms = nn.ModuleList(norm_layer(norm, HIDDEN, dimensions=0) for _ in range(STEPS))
        for layer in self.norms:
            for name, parameter in self.norms[0].named_parameters():
                setattr(layer, name, parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        rows = self.read(images.flatten(1, 2))  # (N, 28, 64)
        hidden = images.new_zeros(len(images), HIDDEN)
        for step, norm in enumerate(self.norms):
            hidden = torch.tanh(norm(rows[:, step] + self.keep(hidden)))
        logits: Tensor = self.head(hidden)
        return logits


def with_shared_statistics(model: RowReader, images: Tensor, labels: Tensor, batches: Sequence[Tensor]) -> float:
    """Return the accuracy of a copy in which one batch norm is called in every time step, as a plain module would be.

    In training nothing differs but what is stored; that is filled by these batches.
    """
    with probe(model) as copied:
        shared = copied.norms[0]
        copied.norms = nn.ModuleList([shared] * STEPS)
        copied.train()
        with torch.no_grad():
            for batch in batches:
                copied(batch)
        return evaluate(copied, images, labels)[1]


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train and yield each epoch's loss and accuracies."""
    model = with_seed(lambda: RowReader(cell.norm), cell.seed)
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(1000 + cell.seed))
    filling = [
        dataset.train_images[part].to(cell.device)
        for part in order.split(cell.settings.batch_size)
        if len(part) == cell.settings.batch_size
    ][:FILLING]
    images, labels = dataset.test_images.to(cell.device), dataset.test_labels.to(cell.device)
    for epoch in train(model, dataset, cell.settings, cell.seed, cell.device):
        shared = with_shared_statistics(model, images, labels, filling) if cell.norm == "batch" else epoch.test_accuracy
        yield {
            "epoch": epoch.epoch,
            "train_loss": epoch.train_loss,
            "test_accuracy": epoch.test_accuracy,
            "shared_accuracy": shared,
        }


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge layer norm against batch norm with statistics for every step; beside it, no norm and shared statistics."""
    sides = {norm: of_norm(rows, norm) for norm in ("none", "batch", "layer")}
    accuracies = {norm: late_accuracies(side) for norm, side in sides.items()}
    return conclude(
        paired(LAYER, accuracies["layer"], accuracies["batch"]),
        premises=[learnt(sides["layer"], sides["batch"])],
        details=[
            paired(HELPS, accuracies["layer"], accuracies["none"]),
            paired(SHARED, accuracies["batch"], late_accuracies(sides["batch"], "shared_accuracy")),
        ],
        compared="layer norm against batch norm",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show training loss and accuracy by epoch."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    panels = [
        Panel(
            title=title,
            x_label="epoch",
            y_label=unit,
            marks=[
                *(
                    over_epochs(of_norm(rows, norm), column, label=norm_label(norm), **look)
                    for norm, look in zip(norms, looks(norms), strict=True)
                ),
                *(
                    over_epochs(
                        of_norm(rows, norm), "shared_accuracy", label="batch norm, steps share", **look,
                        dashed=True,
                    )
                    for norm, look in zip(norms, looks(norms), strict=True)
                    if norm == "batch" and column == "test_accuracy"
                ),
            ],
        )
        for title, unit, column in (
            ("Training loss", "cross-entropy", "train_loss"),
            ("Test accuracy", "accuracy", "test_accuracy"),
        )
    ]  # fmt: skip
    lines = [[norm, spread_in_words(list(late_accuracies(of_norm(rows, norm)).values()))] for norm in norms]
    if "batch" in norms:
        shared = spread_in_words(list(late_accuracies(of_norm(rows, "batch"), "shared_accuracy").values()))
        lines.append(["batch, all steps share their statistics", shared])
    table = Table(
        title="Test accuracy, mean over the last three epochs",
        header=["norm", "test accuracy"],
        rows=lines,
        note="Mean ± standard deviation over seeds.",
    )
    words = "; ".join(f"{line[0]}: {line[1]}" for line in lines)
    text = f"Curves by epoch of training loss and test accuracy. Accuracy over the last three: {words}."
    return Chart(name="recurrent", title="A recurrent net that reads rows", panels=panels, text=text), table


CLAIM = Claim(
    id="recurrent",
    number="E31",
    title="Layer normalization makes a recurrent net more accurate than batch normalization",
    statement="In a recurrent net the statistics of a batch differ from time step to time step; layer normalization, "
    "which asks each sample alone, is the norm to take there.",
    source="Ba, Kiros and Hinton 2016, Layer normalization, arXiv:1607.06450, section 3.1; repeated in the source S2. "
    "Batch norm with statistics for every time step after Cooijmans et al. 2017, arXiv:1603.09025",
    prediction="The test accuracy over the last three epochs is higher with layer norm than with batch norm that "
    "stores its statistics for every time step; within 0.01 is no difference. Beside it: it is higher than without "
    "a norm, and a batch norm whose time steps share what is stored loses more than five points by that.",
    question=LAYER,
    premises=(LEARNT,),
    details=(HELPS, SHARED),
    settings_rule="A recurrent net of 64 tanh units reads 28 rows of 28 pixels; the norm stands on the sum of input "
    "and recurrence, before tanh. The recurrent weights start orthogonal. Adam at 0.003 and batches of 64 for all, "
    "chosen before any run; nothing was searched. Statistics that all steps share are filled by 20 batches of the "
    "training images with the weights held.",
    meaning={
        "supported": "Layer norm is more accurate in this recurrent net, and needs no statistics to be stored for "
        "every time step, which a longer sequence would not have.",
        "refuted": "Batch norm with statistics for every time step is more accurate in this recurrent net of fixed "
        "length. With statistics that the steps share it may still fail: see the detail.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch", "layer"),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, epochs=6, train_images=3000, test_images=2000)},
    measure=measure,
    judge=decide,
    show=show,
)
