"""E23: batch statistics make a net less sensitive to a single abnormal sample."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_epochs
from ..data import Dataset
from ..networks import LeNet5
from ..premises import LEARNT, learnt
from ..probes import probe
from ..rows import compared_norms, mean_of, of_norm, per_seed, spread_in_words
from ..training import TrainingSettings, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "sensitivity"]

# The abnormal sample is an image of the batch with every pixel so many times as large.
FACTOR = 20.0
BATCHES = 8
# A change of nothing has no logarithm; rounding leaves changes of about 1e-7.
LEAST = 1e-9
LESS = Rule(
    effect="log10 of how far one abnormal sample changes the batch's gradient, in its norm, mean over epochs, with the "
    "norm minus without",
    unit="decades",
    direction="below",
    line=0.0,
    band=(-0.1, 0.1),
)
OTHERS = Rule(
    effect="log10 of how far one abnormal sample changes the gradient of the other samples, in its norm, mean over "
    "epochs, with the norm",
    unit="decades",
    direction="below",
    line=0.0,
)
SETTINGS = TrainingSettings(epochs=5, batch_size=64, optimizer="adam", learning_rate=0.002)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train LeNet-5 and yield, per epoch, how far an abnormal sample moves the gradient on a few batches."""
    model = with_seed(lambda: LeNet5(cell.norm), cell.seed)
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(1000 + cell.seed))
    batches = [
        (dataset.train_images[batch].to(cell.device), dataset.train_labels[batch].to(cell.device))
        for batch in order[: BATCHES * cell.settings.batch_size].split(cell.settings.batch_size)
    ]
    for epoch in train(model, dataset, cell.settings, cell.seed, cell.device):
        found = [sensitivity(model, *batch) for batch in batches]
        yield {
            "epoch": epoch.epoch,
            "test_accuracy": epoch.test_accuracy,
            "whole": fmean(math.log10(max(whole, LEAST)) for whole, _ in found),
            "others": fmean(math.log10(max(others, LEAST)) for _, others in found),
        }


def sensitivity(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return how far the gradient moves when the batch's first sample becomes abnormal, over the gradient's norm.

    Of the batch's mean loss, and of the mean loss of all samples but the first.
    """
    abnormal = torch.cat([images[:1] * FACTOR, images[1:]])
    with probe(model) as copied:
        copied.train()
        parameters = list(copied.parameters())

        def gradients(batch: Tensor) -> list[Tensor]:
            losses = functional.cross_entropy(copied(batch), labels, reduction="none")
            return [
                torch.cat(
                    [part.flatten() for part in torch.autograd.grad(loss, parameters, retain_graph=True)]
                ).double()
                for loss in (losses.mean(), losses[1:].mean())
            ]

        usual, moved = gradients(images), gradients(abnormal)
    whole, others = (
        float((there - here).norm() / here.norm().clamp_min(1e-30)) for here, there in zip(usual, moved, strict=True)
    )
    return whole, others


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the whole batch's gradient; beside it the gradient of the samples that are not abnormal."""
    candidate, baseline = compared_norms(rows)
    sides = [of_norm(rows, candidate), of_norm(rows, baseline)]
    return conclude(
        paired(LESS, *(per_seed(side, partial(mean_of, "whole")) for side in sides)),
        premises=[learnt(*sides)],
        details=[single(OTHERS, per_seed(sides[0], partial(mean_of, "others")))],
        compared=f"{candidate} against {baseline}",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show both changes by epoch, and their means."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    columns = {"whole": "gradient of the whole batch", "others": "gradient of the other samples"}
    panels = [
        Panel(
            title=f"{name[0].upper()}{name[1:]}",
            x_label="epoch",
            y_label="log10 of the change",
            marks=[
                over_epochs(of_norm(rows, norm), column, label=norm_label(norm), **look)
                for norm, look in zip(norms, looks(norms), strict=True)
            ],
        )
        for column, name in columns.items()
    ]
    lines = [
        [
            norm,
            *(
                spread_in_words(list(per_seed(of_norm(rows, norm), partial(mean_of, column)).values()), 2)
                for column in columns
            ),
        ]
        for norm in norms
    ]
    table = Table(
        title="How far one abnormal sample of 64 changes the gradient, log10 of its norm, mean over epochs",
        header=["norm", *columns.values()],
        rows=lines,
        note=f"Mean ± standard deviation over seeds. The abnormal sample has every pixel {FACTOR:g} times as large. "
        "Without a norm the other samples do not notice it: what is measured is rounding, or nothing.",
    )
    words = "; ".join(f"{norm_label(line[0])}, whole batch {line[1]}, other samples {line[2]}" for line in lines)
    text = f"Curves by epoch of how far one abnormal sample changes the gradient, log10. {words.capitalize()}."
    return Chart(name="outlier", title="One abnormal sample in the batch", panels=panels, text=text), table


CLAIM = Claim(
    id="outlier",
    number="E23",
    title="Batch normalization makes the gradient less sensitive to one abnormal sample",
    statement="Statistics over the whole batch make the net less sensitive to single, abnormal samples.",
    source="Batch normalization built from scratch, section 3.4",
    prediction="When one image of 64 has its pixels multiplied by 20, the batch's gradient changes less with batch "
    "normalization than without: a difference of log10 below 0; within 0.1 is none. Beside it: whether the gradient of "
    "the other 63 samples changes by less than its own norm with batch normalization; without, it cannot change.",
    question=LESS,
    premises=(LEARNT,),
    details=(OTHERS,),
    settings_rule="LeNet-5 with E1's optimiser, rate and batch size, chosen for the net without a norm. After every "
    "epoch, on the same eight batches for both sides, in training mode on a copy. Nothing was searched. On "
    "FashionMNIST 3,000 training and 2,000 test images, drawn by class for every seed.",
    meaning={
        "supported": "The batch's statistics damp what one abnormal sample does to the step. They do so by changing "
        "what all other samples contribute: without a norm those do not notice it.",
        "refuted": "One abnormal sample changes the step more with the norm: through the batch's statistics it reaches "
        "the gradient of every other sample, which without a norm does not notice it.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=3000, test_images=2000)},
    measure=measure,
    judge=decide,
    show=show,
)
