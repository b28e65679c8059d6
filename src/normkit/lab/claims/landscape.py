"""E9: batch normalization makes the optimization landscape smoother."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...layers import BatchNorm1d
from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_epochs
from ..data import Dataset
from ..networks import LeNet5
from ..premises import LEARNT, learnt
from ..probes import probe
from ..rows import as_number, compared_norms, mean_and_spread, mean_of, of_norm, per_seed
from ..training import TrainingSettings, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "theorem_deviation"]

RANGE = Rule(
    effect="log10 of the loss's range along the gradient, mean over epochs, with the norm minus without",
    unit="decades",
    direction="below",
    line=0.0,
)
CHANGE = Rule(
    effect="log10 of the gradient's change along the gradient, mean over epochs, with the norm minus without",
    unit="decades",
    direction="below",
    line=0.0,
)
THEOREM = Rule(
    effect="deviation of both sides of theorem 4.1 from each other, relative, in float64",
    unit="",
    direction="below",
    line=1e-10,
)
# In units of the learning rate, as Santurkar et al. go from a half to four rates along the gradient.
STEPS = (0.5, 1.0, 2.0, 3.0, 4.0)
BATCHES = 4
SETTINGS = TrainingSettings(epochs=8, batch_size=64, optimizer="sgd", learning_rate=0.1)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train LeNet-5 and yield, after each epoch, how loss and gradient vary along the gradient on a few batches."""
    model = with_seed(lambda: LeNet5(cell.norm), cell.seed)
    theorem = theorem_deviation(dataset, cell.seed) if cell.norm == "batch" else None
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(1000 + cell.seed))
    batches = [
        (dataset.train_images[batch].to(cell.device), dataset.train_labels[batch].to(cell.device))
        for batch in order[: BATCHES * cell.settings.batch_size].split(cell.settings.batch_size)
    ]
    for epoch in train(model, dataset, cell.settings, cell.seed, cell.device):
        along = [_along_gradient(model, *batch, cell.settings.learning_rate) for batch in batches]
        yield {
            "epoch": epoch.epoch,
            "train_loss": epoch.train_loss,
            "test_accuracy": epoch.test_accuracy,
            "log_range": fmean(loss for loss, _ in along),
            "log_change": fmean(change for _, change in along),
            "theorem": theorem,
        }


def _along_gradient(model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> tuple[float, float]:
    """Return log10 of the loss's range, and of the gradient's largest change, over steps along the gradient."""
    with probe(model) as copied:
        copied.train()
        parameters = list(copied.parameters())
        start = [parameter.detach().clone() for parameter in parameters]

        def look() -> tuple[float, list[Tensor]]:
            loss = functional.cross_entropy(copied(images), labels)
            return float(loss.detach()), list(torch.autograd.grad(loss, parameters))

        loss, gradient = look()
        losses, changes = [loss], []
        for step in STEPS:
            with torch.no_grad():
                for parameter, origin, direction in zip(parameters, start, gradient, strict=True):
                    parameter.copy_(origin - step * rate * direction)
            loss, there = look()
            losses.append(loss)
            pairs = zip(there, gradient, strict=True)
            changes.append(math.sqrt(sum(float((a - b).double().square().sum()) for a, b in pairs)))
    least = 1e-12
    return math.log10(max(max(losses) - min(losses), least)), math.log10(max(*changes, least))


def theorem_deviation(dataset: Dataset, seed: int) -> float:
    """Return the relative deviation of both sides of theorem 4.1, for a dense layer on a batch of images.

    With ``g`` the loss's gradient for a norm's outputs, the squared gradient for its inputs is, channel by channel,
    ``gamma^2 / var * (|g|^2 - <1, g>^2 / m - <g, xhat>^2 / m)``. It is exact at eps = 0; here eps is 1e-30.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randperm(len(dataset.train_labels), generator=generator)[:64]
    weight, head = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((50, 784), (10, 50)))
    x = (dataset.train_images[batch].double().flatten(1) @ weight.T).requires_grad_()
    layer = BatchNorm1d(50, eps=1e-30).double()
    gamma = layer.get_parameter("weight")
    with torch.no_grad():
        gamma.copy_(torch.rand(50, generator=generator, dtype=torch.float64) + 0.5)
    y = layer(x)
    loss = functional.cross_entropy(y @ head.T, dataset.train_labels[batch])
    before, after = torch.autograd.grad(loss, [x, y])
    var, mean = torch.var_mean(x.detach(), dim=0, correction=0)
    xhat = (x.detach() - mean) / var.sqrt()
    count = len(batch)
    inner = after.square().sum(0) - after.sum(0).square() / count - (after * xhat).sum(0).square() / count
    right = gamma.detach().square() / var * inner
    left = before.square().sum(0)
    return float(((left - right).abs() / right).max())


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge range and change as means over the epochs, and the theorem where batch norm took part."""
    candidate, baseline = compared_norms(rows)
    sides = [of_norm(rows, candidate), of_norm(rows, baseline)]
    ranges = [per_seed(side, partial(mean_of, "log_range")) for side in sides]
    changes = [per_seed(side, partial(mean_of, "log_change")) for side in sides]
    details = [paired(CHANGE, *changes)]
    if candidate == "batch":
        details.append(single(THEOREM, per_seed(sides[0], lambda run: as_number(run[0]["theorem"]))))
    return conclude(
        paired(RANGE, *ranges),
        premises=[learnt(*sides)],
        details=details,
        compared=f"{candidate} against {baseline}",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show range and change by epoch, and their means."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    columns = {"log_range": "range of the loss", "log_change": "change of the gradient"}
    panels = [
        Panel(
            title=f"{name[0].upper()}{name[1:]} along the gradient",
            x_label="epoch",
            y_label="log10",
            marks=[
                over_epochs(of_norm(rows, norm), column, label=norm_label(norm), **look)
                for norm, look in zip(norms, looks(norms), strict=True)
            ],
        )
        for column, name in columns.items()
    ]
    lines = []
    for norm in norms:
        means = [per_seed(of_norm(rows, norm), partial(mean_of, column)) for column in columns]
        spreads = [mean_and_spread(list(values.values())) for values in means]
        lines.append([norm, *(f"{mean:+.3f} ± {spread:.3f}" for mean, spread in spreads)])
    words = "; ".join(f"{norm_label(line[0])}, range {line[1]} and change {line[2]}" for line in lines)
    table = Table(
        title="Along the gradient, log10, mean over epochs",
        header=["norm", *columns.values()],
        rows=lines,
        note="Mean ± standard deviation over seeds. Steps of 0.5, 1, 2, 3 and 4 learning rates, four batches an epoch.",
    )
    text = f"Curves by epoch of the loss's range and the gradient's change along the gradient. Means: {words}."
    return Chart(name="landscape", title="How rough the way along the gradient is", panels=panels, text=text), table


CLAIM = Claim(
    id="landscape",
    number="E9",
    title="Batch normalization makes the loss vary less along the gradient",
    statement="The optimization landscape is smoother: along the gradient, the loss varies over a smaller range and "
    "the gradient itself changes less in a network with batch normalization; the norm shrinks the gradient by the part "
    "that theorem 4.1 names.",
    source="Santurkar et al. 2018, How does batch normalization help optimization?, arXiv:1805.11604, figure 4 and "
    "theorem 4.1; repeated in the source S1",
    prediction="Along 0.5 to 4 learning rates in the gradient's direction, log10 of the loss's range is below that of "
    "the net without a norm. Beside it: the same of the gradient's change, and theorem 4.1 holds to 1e-10.",
    question=RANGE,
    premises=(LEARNT,),
    details=(CHANGE, THEOREM),
    design=2,
    settings_rule="Plain gradient descent on batches of 64 at a rate of 0.1, the rate of the paper's own figures, for "
    "both sides. The batches looked at are the same on both sides and in every epoch. Nothing was searched. "
    "On FashionMNIST 3,000 training and 2,000 test images are used, drawn by class, for the sake of time.",
    meaning={
        "supported": "With these settings the loss varies less along the gradient with the norm. This is a statement "
        "about steps of a fixed length in the weights, which the norm rescales.",
        "refuted": "With these settings the loss varies more along the gradient with the norm. A norm makes the loss "
        "blind to the weights' scale, which lengthens gradients.",
        "inconclusive": "An interval holds its line, or too few seeds were run. More seeds make the intervals "
        "narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=3000, test_images=2000)},
    measure=measure,
    judge=decide,
    show=show,
)
